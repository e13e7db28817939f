"""Lightning: the datamodule, tasks, losses and callbacks."""
