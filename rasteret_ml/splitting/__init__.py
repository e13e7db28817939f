"""Step 12. Ground, AOIs and records dealt into splits, and the check that none leaks into another.

Knows samplers by what they reach, and records by their columns. It must never read a pixel.
"""
