"""From compressed tiles to arrays; `decode` is the entrance."""
