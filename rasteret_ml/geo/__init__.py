"""Plane geometry without I/O: grids, windows, CRSs, times, geometries, regions and resampling."""
