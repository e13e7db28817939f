"""Step 16. Training: Lightning lives here, and nowhere below.

Datamodule, task, statistics, normalising and augmenting on the device, metrics, predictions to maps.
"""
