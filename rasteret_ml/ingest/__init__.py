"""Step 9. Makes Collections: sources to drafts, drafts to headers, headers to rows.

Knows file names, tables and STAC. It must never know samples or models.
"""
