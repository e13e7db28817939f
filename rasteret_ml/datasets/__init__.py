"""TorchGeo datasets over a Collection or polygons, and their `&` and `|`."""
