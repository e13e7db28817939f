"""Predict maps: blend chips and write Cloud Optimized GeoTIFFs."""
