"""rasteret_ml."""
