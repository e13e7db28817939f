"""Step 14. Polygons as labels: painted onto a chip when it is asked for.

Knows the contract of a batch's two halves (`loading.reading`) and nothing of records.
"""
