"""Step 17. Polygons as labels: painted onto a chip when it is asked for.

Knows the contract of a batch's two halves (`reading.readable`) and nothing of records.
"""
