"""Step 11. Batches and training: torch, torchgeo and Lightning live here, and nowhere below.

A torchgeo GeoDataset over a Collection, its `&` and `|`, collate, loader, statistics, datamodule, maps.
"""
