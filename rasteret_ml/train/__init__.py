"""Step 21. Training: Lightning lives here, and nowhere below.

Datamodule, tasks, losses and metrics that heed validity, watching, predictions to maps.
"""
