"""Step 6. A row becomes pixels: plan (pure), execute (thin), and the accessor that speaks the whole sentence.

Knows grids, tiles, records and readers. It must never know tables, samplers or batches.
"""
