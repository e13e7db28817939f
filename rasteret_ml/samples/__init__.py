"""Step 14. Samples and batches of them: shared buffers, collating, composites, joining, blank ones, pictures.

Tensors alone and TorchGeo's helpers: no file, no record and no loop.
"""
