"""What chips give and what a map's file holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.predict.blend import Arrays, Merge, Merging, merging
from rasteret_ml.predict.block_store import Layout

__all__ = ["CHOSEN_ABOVE", "Output", "OutputSpec"]

Output = Literal["classes", "scores"]
"""What a map holds: the class of each pixel, or a band of scores for each plane of the model's output."""

CHOSEN_ABOVE = 0.5
"""The score above which a single plane means class 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """Known with the first chip, and the same for all chips of a map."""

    output: Output
    """What the file holds."""
    merge: Merge
    """How overlapping chips are merged."""
    labels: bool
    """Whether chips are classes `[1, H, W]`; else they are scores `[K, H, W]`."""
    planes: int
    """K."""
    dtype: str
    """Type of the file."""
    nodata: float
    """The file's value where nothing was predicted."""
    block: int
    """Side of a block in pixels."""

    @classmethod
    def of(
        cls, planes: int, labels: bool, *, output: Output, merge: Merge, nodata: int | None, block: int
    ) -> OutputSpec:
        """The form of a map of predictions with so many planes.

        Raises:
            UsageError: labels where scores are needed, or a nodata value that is a class.
        """
        if labels and (merge == "blend" or output == "scores"):
            raise UsageError(
                f"The model gives classes, of which output={output!r} with merge={merge!r} cannot be made; give scores "
                "[B, K, H, W] (floating point), or take output='classes' and merge='centre'."
            )
        if output == "scores":
            dtype, value = "float32", float("nan")
        else:
            classes = 2 if planes == 1 else planes
            dtype = "uint8" if (0 if labels else classes) <= 255 and (nodata is None or nodata <= 255) else "uint16"
            value = float(np.iinfo(dtype).max if nodata is None else nodata)
            if not labels and value < classes:
                raise UsageError(f"nodata={nodata} is one of the {classes} classes; take another value.")
        # Of a nearest chip only its choice is kept.
        labels = labels or (output == "classes" and merge == "centre")
        planes = 1 if labels else planes
        return cls(output=output, merge=merge, labels=labels, planes=planes, dtype=dtype, nodata=value, block=block)

    @property
    def merging(self) -> Merging:
        """How chips become blocks."""
        return merging(self.merge, self.dtype)

    @property
    def layout(self) -> Layout:
        """What is kept of a block while chips may still change it."""
        return self.merging.layout(self.planes, self.block)

    @property
    def finished(self) -> Layout:
        """What is kept of it afterwards: the file's pixels."""
        return ((((self.planes if self.output == "scores" else 1), self.block, self.block), self.dtype),)

    def values(self, predicted: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        """Predictions `[B, K, H, W]` as they are merged: scores float32, or classes of the file's type.

        What is not `valid` `[B, H, W]` may be anything.

        Raises:
            UsageError: a class that the file cannot hold.
        """
        if not self.labels:
            return predicted.astype(np.float32, copy=False)
        if predicted.dtype.kind == "f":
            predicted = _chosen(predicted, axis=1)
        predicted = np.where(valid[:, None], predicted, predicted.dtype.type(0))
        low, high = int(predicted.min(initial=0)), int(predicted.max(initial=0))
        if low < 0 or high > np.iinfo(self.dtype).max or bool((predicted[valid[:, None]] == self.nodata).any()):
            raise UsageError(
                f"Classes {low} to {high} do not fit a {self.dtype} map whose nodata is {self.nodata:g}; choose "
                "another nodata= (one above 255 makes the map uint16)."
            )
        return predicted.astype(self.dtype)

    def render(self, block: Arrays) -> npt.NDArray[Any]:
        """The file's pixels of a block."""
        values, valid = self.merging.result(block)
        if self.output == "classes" and not self.labels:
            values = _chosen(values, axis=0)
        return np.where(valid, values, np.array(self.nodata).astype(self.dtype)).astype(self.dtype)


def _chosen(scores: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """The class with the highest score, the axis kept; of one plane, whether it is above `CHOSEN_ABOVE`."""
    if scores.shape[axis] == 1:
        return (scores > CHOSEN_ABOVE).astype(np.int64)
    found: npt.NDArray[Any] = scores.argmax(axis=axis, keepdims=True)
    return found
