"""Resampling: which source pixels a grid needs, and the kernels that read them."""
