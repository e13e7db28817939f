"""Step 8. The Parquet table: schema, immutable views, atomic writing.

Knows pyarrow and records. It must never know pixels, and never turns a tile table into Python integers.
"""
