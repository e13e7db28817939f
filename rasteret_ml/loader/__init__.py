"""The DataLoader: prefetching, error recovery, resumable state and statistics."""
