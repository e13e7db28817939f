"""Losses and metrics over what is known: labels that are `ignore_index` or NaN count nowhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchmetrics import MetricCollection

from rasteret_ml.errors import UsageError

__all__ = [
    "MaskedLoss",
    "MaskedMetrics",
    "class_iou",
    "confusion_matrix",
    "known_labels",
    "majority_baseline",
    "mean_iou",
]


def confusion_matrix(target: Any, predicted: Any, classes: int, valid: Any = True) -> npt.NDArray[np.int64]:
    """Counts `[classes, classes]`, rows = target, columns = prediction; targets outside 0..classes-1 do not count."""
    target, predicted = np.asarray(target), np.asarray(predicted)
    keep = np.broadcast_to(np.asarray(valid), target.shape) & (target >= 0) & (target < classes)
    keep = keep & (predicted >= 0) & (predicted < classes)
    pairs = target[keep].astype(np.int64) * classes + predicted[keep].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def class_iou(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Intersection over union of each class, NaN for a class that neither side has."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    ratio = np.full(len(hits), np.nan)
    np.divide(hits, union, out=ratio, where=union > 0)
    return ratio


def mean_iou(confusion: npt.NDArray[np.int64]) -> float:
    """Mean of `class_iou` over the classes that occur."""
    return float(np.nanmean(class_iou(confusion)))


def majority_baseline(confusion: npt.NDArray[np.int64]) -> float:
    """The mean IoU of always answering the most frequent class of the targets."""
    totals = confusion.sum(1)
    always = np.zeros_like(confusion)
    always[:, int(np.argmax(totals))] = totals
    return mean_iou(always)


_ELEMENTWISE = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def known_labels(target: torch.Tensor, ignore_index: int | None = -100) -> torch.Tensor:
    """True where a label counts: not `ignore_index` (None = no such class), not NaN."""
    known = ~target.isnan() if target.is_floating_point() else torch.ones_like(target, dtype=torch.bool)
    return known if ignore_index is None else known & (target != ignore_index)


class MaskedLoss(nn.Module):
    """Any loss, averaged over the labels that are known.

    Predictions are `[B, ...]` as the labels, or `[B, K, ...]` with classes along axis 1. Where no label of a batch is
    known the loss is 0 with a gradient of zeros, so that a step, or a rank, without labels changes nothing; torch's own
    are NaN then. Predictions where labels are unknown get no gradient, even if they are NaN.

    Losses of torch (cross-entropy, BCE with logits, MSE, L1, smooth L1, Huber) with `reduction="none"` are computed
    everywhere and averaged here, by class weights where the cross-entropy has such, so that the host need not wait for
    the device. Any other gets what is known alone, as one sample: `[1, N]`, and `[1, K, N]` of classes.

    Args:
        loss: Of `(prediction, target)`.
        ignore_index: Label that does not count; None where all numbers are values, as in regression. NaN never counts.
    """

    def __init__(self, loss: nn.Module, ignore_index: int | None = -100) -> None:
        super().__init__()
        self.loss, self.ignore_index = loss, ignore_index
        self.counted = 0
        """Labels that the last loss is a mean of; in training they are not counted, which would wait for the device."""

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean loss, a scalar.

        Raises:
            UsageError: values that are not one for each label.
        """
        if isinstance(self.loss, _ELEMENTWISE) and not isinstance(self.loss, nn.CrossEntropyLoss):
            prediction = _like_labels(prediction, target)
        known = known_labels(target, self.ignore_index)
        self.counted = 0 if self.training else int(known.sum())
        spread = known if prediction.ndim == target.ndim else known.unsqueeze(1)
        # NaN times 0 is NaN, in gradients too: unknown places are replaced before the loss, not after.
        prediction = torch.where(spread, prediction, 0.0)
        target = torch.where(known, target, 0)
        if not isinstance(self.loss, _ELEMENTWISE) or self.loss.reduction != "none":
            return self._of_known(prediction, target, known)
        each, weight = torch.where(known, self.loss(prediction, target), 0.0), self._class_weight
        shares = known.to(each.dtype) if weight is None else torch.where(known, weight[target], 0.0)
        total = shares.sum()
        mean: torch.Tensor = each.sum() / torch.where(total > 0, total, 1.0)
        return mean

    @property
    def _class_weight(self) -> torch.Tensor | None:
        return self.loss.weight if isinstance(self.loss, nn.CrossEntropyLoss) else None

    def _of_known(self, prediction: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        weight = self._class_weight
        if not known.any() or (weight is not None and not weight[target[known]].any()):
            return prediction.sum() * 0
        classes = prediction.ndim > target.ndim
        chosen = prediction.movedim(1, -1)[known].T if classes else prediction[known]
        found: torch.Tensor = self.loss(chosen[None], target[known][None])
        return found


def _like_labels(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Values in the shape of labels: torch would spread `[B, 1, H, W]` over `[B, H, W]`, each sample over all."""
    if prediction.ndim == target.ndim + 1 and prediction.shape[1] == 1:
        prediction = prediction.squeeze(1)
    if prediction.shape != target.shape:
        raise UsageError(
            f"Predictions {list(prediction.shape)} are not one for each label {list(target.shape)}, as this loss wants."
        )
    return prediction


class MaskedMetrics(MetricCollection):
    """Metrics that see what is known alone, as those of regression do not by themselves.

    Labels of samples (`[B]` or `[B, K]`) count by row, where all of it is known, labels of pixels one by one.

    Args:
        metrics: As torchmetrics' collection takes them.
        ignore_index: See `MaskedLoss`.
        **options: As torchmetrics' collection takes them.
    """

    def __init__(self, metrics: Any, ignore_index: int | None = -100, **options: Any) -> None:
        super().__init__(metrics, **options)
        self.ignore_index = ignore_index

    def forward(self, preds: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Values of this batch, which is added to all; NaN where nothing of it is known."""
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
