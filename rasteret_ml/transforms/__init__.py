"""Transforms for batches on the device: normalize, augment, flip."""
