"""Scores of a segmentation over all chips that are validated or tested, on one process or several."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch

from rasteret_ml.train.losses import class_iou, confusion_matrix, majority_baseline, mean_iou


class ClassScores(pl.Callback):
    """Counts, in `trainer.validate` and `trainer.test`, which class was taken for which: `confusion` when they end."""

    def __init__(self) -> None:
        self.confusion: npt.NDArray[np.int64] | None = None
        """Counts `[classes, classes]`, rows = labels, columns = predictions; None before."""

    def _start(self, trainer: Any, module: Any) -> None:
        self._counts = torch.zeros((), dtype=torch.int64)

    def _count(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0) -> None:
        if trainer.state.fn != "fit":
            scores = module(batch["image"])
            found = confusion_matrix(batch["mask"].cpu(), scores.argmax(1).cpu(), scores.shape[1])
            self._counts = self._counts + torch.from_numpy(found)

    def _end(self, trainer: Any, module: Any) -> None:
        if self._counts.ndim:
            summed = trainer.strategy.reduce(self._counts.to(module.device), reduce_op="sum")
            self.confusion = summed.cpu().numpy()

    on_validation_start = on_test_start = _start
    on_validation_batch_end = on_test_batch_end = _count
    on_validation_end = on_test_end = _end


def print_scores(confusion: npt.NDArray[np.int64], names: list[str], what: str = "validation") -> None:
    """Mean IoU beside that of always saying the most frequent class, and each class's."""
    print(f"{what} mIoU".ljust(20), f"{mean_iou(confusion):.3f}   ", end="")
    print(f"(always the majority class: {majority_baseline(confusion):.3f})")
    for name, value in zip(names, class_iou(confusion), strict=False):
        print(f"  {name:<18} {value:.3f}")
