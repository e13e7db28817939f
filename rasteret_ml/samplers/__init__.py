"""Samplers: which AOIs are drawn, and in which order."""
