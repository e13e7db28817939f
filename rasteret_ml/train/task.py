"""TorchGeo's segmentation task with a schedule for short runs."""

from __future__ import annotations

from typing import Any

import torch

try:  # TorchGeo 0.10 renamed its trainers to tasks
    from torchgeo.tasks import SemanticSegmentation
except ImportError:
    from torchgeo.trainers import SemanticSegmentationTask as SemanticSegmentation

__all__ = ["SegmentationTask"]


class SegmentationTask(SemanticSegmentation):
    """TorchGeo's semantic segmentation task trained with AdamW and one learning-rate cycle.

    Takes TorchGeo's arguments; `lr` is the peak of the cycle (Smith & Topin 2017), which spans the whole run.
    """

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule, stepped each batch."""
        lr = float(self.hparams["lr"])
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=1e-2)
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
