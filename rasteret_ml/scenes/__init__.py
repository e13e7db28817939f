"""Step 13. The records of a Collection as scenes: where and when each is, found in space and time, in little memory.

Arrays and shapes only: no torch, and no byte of a raster.
"""
