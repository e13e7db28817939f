"""Read single rows from memory-mapped Parquet copies."""
