"""Lightning's checkpoints, so that training goes on exactly where they were taken."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

__all__ = ["ExactResume", "mend_epoch_count"]


class ExactResume(pl.Callback):
    """Lets Lightning resume exactly more than once; `RasteretDataModule` does it by itself.

    Lightning saves a loader's state (`DataLoader.state_dict`) by itself, and gives it back only where it takes an epoch
    to be unfinished. A run that went on from a checkpoint of an epoch's last batch does not count the next epoch as
    begun (seen in Lightning 2.6), so that a second resume would begin that epoch anew. This callback mends the count
    in each checkpoint.
    """

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Mend the count."""
        mend_epoch_count(trainer, checkpoint)


def mend_epoch_count(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Count the epoch that is being trained as begun, in a checkpoint that is about to be saved."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    if not trainer.training or progress is None:
        return
    for counts in progress.values():  # of this run, and in total
        if counts["completed"] == counts["ready"]:  # while an epoch is trained, one is not completed
            counts["ready"] = counts["started"] = counts["completed"] + 1
