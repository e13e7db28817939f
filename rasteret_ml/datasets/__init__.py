"""Step 16. TorchGeo's datasets over records: queries become plans, plans samples; their `&` and `|`.

How a batch is read when, and what is done about failures, is a step lower.
"""
