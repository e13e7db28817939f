"""Resampling: where pixels lie on another grid, which of them are needed, and their new values."""
