"""TorchGeo's tasks, with losses and metrics that leave invalid pixels out, and a schedule for short runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rasteret_ml.train.losses import MaskedLoss, MaskedMetrics

try:  # TorchGeo 0.10 renamed its trainers to tasks
    from torchgeo.tasks import Classification, PixelwiseRegression, Regression, SemanticSegmentation
except ImportError:
    from torchgeo.trainers import ClassificationTask as Classification
    from torchgeo.trainers import PixelwiseRegressionTask as PixelwiseRegression
    from torchgeo.trainers import RegressionTask as Regression
    from torchgeo.trainers import SemanticSegmentationTask as SemanticSegmentation

__all__ = ["ClassificationTask", "PixelwiseRegressionTask", "RegressionTask", "SegmentationTask"]

_STAGES = ("train_metrics", "val_metrics", "test_metrics")


class _OnChips:
    """What all tasks do alike; TorchGeo's come after it in the order of bases."""

    ignored: int | None = -100
    """Label that does not count, where the arguments do not say another one; None = NaN alone."""
    hparams: Any
    trainer: Any
    criterion: nn.Module

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The model's output for `[B, C, H, W]`, or a series `[B, T, C, H, W]` with T folded into C."""
        folded = image.flatten(1, 2) if image.ndim == 5 else image
        out: torch.Tensor = super().forward(folded)  # type: ignore[misc]
        return out

    def configure_losses(self) -> None:
        """TorchGeo's loss, over labels that are known."""
        if self.hparams.get("ignore_index", 0) is None:
            self.hparams["ignore_index"] = self.ignored
        super().configure_losses()  # type: ignore[misc]
        if isinstance(self.criterion, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss)):
            self.criterion.reduction = "none"
        self.criterion = MaskedLoss(self.criterion, self.hparams.get("ignore_index", self.ignored))

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Lightning's; of validation and testing a loss is the mean over the labels of all batches and ranks."""
        counted = getattr(self.criterion, "counted", None)
        if counted is not None and name in ("val_loss", "test_loss"):
            options |= {"batch_size": counted, "sync_dist": True}
        super().log(name, value, *args, **options)  # type: ignore[misc]

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule, stepped each batch."""
        lr = float(self.hparams["lr"])
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=1e-2)  # type: ignore[attr-defined]
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _CountingKnown(_OnChips):
    """Tasks whose metrics in TorchGeo cannot leave labels out."""

    def configure_metrics(self) -> None:
        """TorchGeo's metrics, over labels that are known."""
        super().configure_metrics()  # type: ignore[misc]
        for stage in _STAGES:
            theirs = getattr(self, stage)
            metrics = MaskedMetrics(dict(theirs.items(keep_base=True)), self.ignored, prefix=theirs.prefix)
            setattr(self, stage, metrics)


class SegmentationTask(_OnChips, SemanticSegmentation):
    """TorchGeo's semantic segmentation of `mask`, trained with AdamW and one learning-rate cycle.

    Takes TorchGeo's arguments; `lr` is the peak of the cycle (Smith & Topin 2017), which spans the whole run.
    `ignore_index` None means -100, the library's own. Of a series, `in_channels` is T times C.
    """


class PixelwiseRegressionTask(_CountingKnown, PixelwiseRegression):
    """TorchGeo's regression of a float `mask`, NaN where unknown; otherwise as `SegmentationTask`."""

    ignored = None


class RegressionTask(_CountingKnown, Regression):
    """TorchGeo's regression of `label`, NaN where unknown; otherwise as `SegmentationTask`."""

    ignored = None


class ClassificationTask(_CountingKnown, Classification):
    """TorchGeo's classification by `label`, -100 where unknown; otherwise as `SegmentationTask`."""
