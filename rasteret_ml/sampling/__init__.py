"""Step 11. Which AOIs, in which order: pure functions of (seed, epoch, position).

Knows geometry and order. It must never read a pixel; torch is here only as the Sampler's base class.
"""
