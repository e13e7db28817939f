"""Batches to model input: statistics, normalisation, augmentation, transfer to the device."""
