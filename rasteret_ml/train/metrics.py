"""Confusion matrices and what is read from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["class_iou", "confusion_matrix", "majority_baseline", "mean_iou"]


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
