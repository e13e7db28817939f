"""TorchGeo's tasks with losses and metrics over known labels, and a one-cycle schedule."""

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


class _MaskedTask:
    """Masked loss and one-cycle schedule; a mixin before TorchGeo's task."""

    default_ignore_index: int | None = -100
    """Label to ignore unless the arguments give another; None = only NaN."""
    hparams: Any
    trainer: Any
    criterion: nn.Module

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Apply the model to `[B, C, H, W]`, or to a series `[B, T, C, H, W]` with T folded into C."""
        folded = image.flatten(1, 2) if image.ndim == 5 else image
        out: torch.Tensor = super().forward(folded)  # type: ignore[misc]
        return out

    def configure_losses(self) -> None:
        """Wrap TorchGeo's loss in `MaskedLoss`."""
        if self.hparams.get("ignore_index", 0) is None:
            self.hparams["ignore_index"] = self.default_ignore_index
        super().configure_losses()  # type: ignore[misc]
        if isinstance(self.criterion, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss)):
            self.criterion.reduction = "none"
        self.criterion = MaskedLoss(self.criterion, self.hparams.get("ignore_index", self.default_ignore_index))

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Log like Lightning; weight validation and test losses by the known labels of each batch and rank."""
        counted = getattr(self.criterion, "counted", None)
        if counted is not None and name in ("val_loss", "test_loss"):
            options |= {"batch_size": counted, "sync_dist": True}
        super().log(name, value, *args, **options)  # type: ignore[misc]

    def configure_optimizers(self) -> Any:
        """Return AdamW with a one-cycle schedule, stepped after each batch."""
        lr = float(self.hparams["lr"])
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=1e-2)  # type: ignore[attr-defined]
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _MaskedMetricsTask(_MaskedTask):
    """Masked metrics for tasks whose TorchGeo metrics cannot ignore labels."""

    def configure_metrics(self) -> None:
        """Wrap TorchGeo's metrics in `MaskedMetrics`."""
        super().configure_metrics()  # type: ignore[misc]
        for stage in _STAGES:
            theirs = getattr(self, stage)
            metrics = MaskedMetrics(dict(theirs.items(keep_base=True)), self.default_ignore_index, prefix=theirs.prefix)
            setattr(self, stage, metrics)


class SegmentationTask(_MaskedTask, SemanticSegmentation):
    """TorchGeo's semantic segmentation of `mask`, trained with AdamW and one learning-rate cycle.

        task = rm.SegmentationTask("unet", "resnet18", in_channels=4, num_classes=5, lr=1e-3)

    Takes TorchGeo's arguments; `lr` is the peak of the cycle (Smith & Topin 2017), which spans the whole run.
    `ignore_index` None means -100, the default of this package. For a series, `in_channels` is T times C.
    """


class PixelwiseRegressionTask(_MaskedMetricsTask, PixelwiseRegression):
    """TorchGeo's regression of a float `mask`, NaN where unknown; otherwise like `SegmentationTask`."""

    default_ignore_index = None


class RegressionTask(_MaskedMetricsTask, Regression):
    """TorchGeo's regression of `label`, NaN where unknown; otherwise like `SegmentationTask`."""

    default_ignore_index = None


class ClassificationTask(_MaskedMetricsTask, Classification):
    """TorchGeo's classification by `label`, -100 where unknown; otherwise like `SegmentationTask`."""
