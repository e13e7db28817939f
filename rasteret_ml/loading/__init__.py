"""Step 18. The loader: order, hints of what comes next, states to resume from, and what it has measured.

torch is at home here; what trains with the batches is a few steps higher.
"""
