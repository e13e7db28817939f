"""Losses and metrics over known labels: labels that are `ignore_index` or NaN do not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import MetricCollection

from rasteret_ml.errors import UsageError

__all__ = ["MaskedLoss", "MaskedMetrics", "known_labels"]

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
        self.counted = 0
        """Known labels in the last batch; not counted in training, where the host would wait for the device."""

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
        if not isinstance(self.loss, _ELEMENTWISE) or self.loss.reduction != "none":
            return self._loss_of_known(prediction, target, known)
        losses, class_weight = torch.where(known, self.loss(prediction, target), 0.0), self._class_weight
        weights = known.to(losses.dtype) if class_weight is None else torch.where(known, class_weight[target], 0.0)
        total = weights.sum()
        mean: torch.Tensor = losses.sum() / torch.where(total > 0, total, 1.0)
        return mean

    @property
    def _class_weight(self) -> torch.Tensor | None:
        return self.loss.weight if isinstance(self.loss, nn.CrossEntropyLoss) else None

    def _loss_of_known(self, prediction: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        weight = self._class_weight
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
