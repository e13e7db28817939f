"""Samples and batches: dictionaries of tensors, labels, composites and collation."""
