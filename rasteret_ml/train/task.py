"""TorchGeo's tasks with losses and metrics over known labels, and a one-cycle schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import MetricCollection

from rasteret_ml.errors import UsageError

_ELEMENTWISE = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def known_labels(target: torch.Tensor, ignore_index: int | None = -100) -> torch.Tensor:
    """Return True where a label is neither `ignore_index` (None = no such label) nor NaN."""
    known = ~target.isnan() if target.is_floating_point() else torch.ones_like(target, dtype=torch.bool)
    return known if ignore_index is None else known & (target != ignore_index)


class MaskedLoss(nn.Module):
    """Averages any loss over the known labels.

        criterion = rm.MaskedLoss(nn.CrossEntropyLoss(reduction="none"))
        criterion(model(batch["image"]), batch["mask"]).backward()

    Predictions have the shape of the labels `[B, ...]`, or `[B, K, ...]` with classes along axis 1. In a batch without
    known labels the loss is 0 with zero gradients, so a step or a rank without labels changes nothing; torch's own
    losses are NaN there. Predictions where labels are unknown get no gradient, even if they are NaN.

    Torch's losses (cross-entropy, BCE with logits, MSE, L1, smooth L1, Huber) with `reduction="none"` are computed
    everywhere and averaged here, by class weights if the cross-entropy has them, so that the host does not wait for the
    device. Other losses get only what is known, as one sample: `[1, N]`, and `[1, K, N]` with classes.

    Args:
        loss: Called with `(prediction, target)`.
        ignore_index: Label to ignore; None if all numbers are values, as in regression. NaN is always ignored.
    """

    def __init__(self, loss: nn.Module, ignore_index: int | None = -100) -> None:
        super().__init__()
        self.loss, self.ignore_index = loss, ignore_index
        #: Known labels in the last batch; not counted in training, where the host would wait for the device.
        self.counted = 0

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mean loss, a scalar.

        Raises:
            UsageError: not one predicted value for each label.
        """
        if isinstance(self.loss, _ELEMENTWISE) and not isinstance(self.loss, nn.CrossEntropyLoss):
            prediction = _squeeze_channel(prediction, target)
        known = known_labels(target, self.ignore_index)
        self.counted = 0 if self.training else int(known.sum())
        has_prediction = known if prediction.ndim == target.ndim else known.unsqueeze(1)
        # Replace unknown values before the loss, not after: NaN times 0 is NaN, in gradients too.
        prediction = torch.where(has_prediction, prediction, 0.0)
        target = torch.where(known, target, 0)
        class_weight = self.loss.weight if isinstance(self.loss, nn.CrossEntropyLoss) else None
        if not isinstance(self.loss, _ELEMENTWISE) or self.loss.reduction != "none":
            return self._loss_of_known(prediction, target, known, class_weight)
        losses = torch.where(known, self.loss(prediction, target), 0.0)
        weights = known.to(losses.dtype) if class_weight is None else torch.where(known, class_weight[target], 0.0)
        total = weights.sum()
        mean: torch.Tensor = losses.sum() / torch.where(total > 0, total, 1.0)
        return mean

    def _loss_of_known(
        self, prediction: torch.Tensor, target: torch.Tensor, known: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        if not known.any() or (weight is not None and not weight[target[known]].any()):
            return prediction.sum() * 0
        selected = prediction.movedim(1, -1)[known].T if prediction.ndim > target.ndim else prediction[known]
        loss: torch.Tensor = self.loss(selected[None], target[known][None])
        return loss


def _squeeze_channel(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squeeze `[B, 1, H, W]` to `[B, H, W]`; torch would broadcast each sample over all."""
    if prediction.ndim == target.ndim + 1 and prediction.shape[1] == 1:
        prediction = prediction.squeeze(1)
    if prediction.shape != target.shape:
        raise UsageError(
            f"Predictions must have the shape of labels {list(target.shape)}, got {list(prediction.shape)}."
        )
    return prediction


class MaskedMetrics(MetricCollection):
    """A collection of metrics over known labels; torchmetrics' regression metrics cannot ignore labels.

    Labels of samples (`[B]` or `[B, K]`) count by row, if the whole row is known, labels of pixels one by one.

    Args:
        metrics: As for `torchmetrics.MetricCollection`.
        ignore_index: See `MaskedLoss`.
        **options: As for `torchmetrics.MetricCollection`.
    """

    def __init__(self, metrics: Any, ignore_index: int | None = -100, **options: Any) -> None:
        super().__init__(metrics, **options)
        self.ignore_index = ignore_index

    def forward(self, preds: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Add a batch and compute its values; NaN if none of its labels is known."""
        preds, target = self._known(preds, target)
        if len(target):
            return dict(super().forward(preds, target))
        unknown = torch.tensor(float("nan"), device=target.device)
        for metric in self.values():
            metric._forward_cache = unknown  # type: ignore[assignment]  # where Lightning looks for a batch's value
        return {str(name): unknown for name in self}

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:  # type: ignore[override]
        """Add a batch."""
        preds, target = self._known(preds, target)
        if len(target):
            super().update(preds, target)

    def _known(self, preds: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = known_labels(target, self.ignore_index)
        if target.ndim <= 2:
            rows = known if known.ndim == 1 else known.all(1)
            return preds[rows], target[rows]
        if preds.ndim > target.ndim:
            preds = preds.movedim(1, -1)
        return preds[known], target[known]


try:  # TorchGeo 0.10 renamed its trainers to tasks
    from torchgeo.tasks import Classification, PixelwiseRegression, Regression, SemanticSegmentation
except ImportError:
    from torchgeo.trainers import ClassificationTask as Classification
    from torchgeo.trainers import PixelwiseRegressionTask as PixelwiseRegression
    from torchgeo.trainers import RegressionTask as Regression
    from torchgeo.trainers import SemanticSegmentationTask as SemanticSegmentation


class _MaskedTask:
    """Masked loss and one-cycle schedule; a mixin before TorchGeo's task."""

    default_ignore_index: int | None = -100  # Label to ignore unless the arguments give another; None = only NaN.
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
        for stage in ("train_metrics", "val_metrics", "test_metrics"):
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
