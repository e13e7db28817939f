"""Step 13. From queries to batches: the torchgeo dataset, its `&` and `|`, reading ahead, collating, the loader.

torch and torchgeo are at home here; what trains with the batches is a step higher.
"""
