"""Step 20. One bounded pass over chips: moments, percentiles, class counts, and weights that even classes out."""
