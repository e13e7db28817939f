"""The Parquet table of raster items."""
