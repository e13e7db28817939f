"""Step 10. Where chips may come from: AOI tables, and what of them a dataset covers.

Geometry and columns alone. It must never read a pixel.
"""
