"""What a map holds (`OutputSpec`), and how overlapping chips are merged into its blocks (`Blend`, `Centre`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.predict.block_store import Arrays, Layout

Mask = npt.NDArray[np.bool_]
#: How overlapping chips are merged: "blend", the mean of their scores, weighted with a window that falls smoothly to a
#: chip's edges; or "centre", each pixel from the one chip in which it is nearest the centre.
Merge = Literal["blend", "centre"]
#: What a map holds: the class of each pixel, or one band of scores for each channel of the model's output.
Output = Literal["classes", "scores"]

_THRESHOLD = 0.5  # The score above which a single channel means class 1.
_POSITION_BITS = 36  # Lower bits of a key of `Centre`, for the chip's position.


@lru_cache(4)
def _hann(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    rows, cols = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in shape)
    return np.outer(rows, cols).astype(np.float32)


@lru_cache(4)
def _centrality(shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Keys `[H, W]` of a chip at position 0: the product of the distances (from 1) to the nearer edges comes first."""
    rows, cols = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in shape)
    keys: npt.NDArray[np.int64] = ((np.outer(rows, cols) + 1) << _POSITION_BITS) - 1
    return keys


class Blend:
    """The weighted mean; the weights are a Hann window (sin^2) over the chip, positive everywhere.

    A block has the sums of weighted scores `[K, H, W]`, and of weights `[H, W]`; both are 0 without a chip.
    """

    def weights(self, shape: tuple[int, int], position: int) -> npt.NDArray[Any]:
        """Return the weight of each pixel of a chip `[H, W]`, for `add`."""
        return _hann(shape)

    def add(self, block: Arrays, values: npt.NDArray[Any], weights: npt.NDArray[Any], valid: Mask) -> None:
        """Add a part of a chip, `values [K, h, w]`, to the same part of a block, in place."""
        if not valid.all():
            weights = weights * valid
            values = np.where(valid, values, 0)  # NaN times 0 is NaN
        for total, scores in zip(block[0], values, strict=True):
            total += scores * weights
        block[1][...] += weights

    def combine(self, block: Arrays, other: Arrays) -> None:
        """Add another rank's version of a block, in place."""
        for total, other_total in zip(block, other, strict=True):
            total += other_total

    def result(self, block: Arrays) -> tuple[npt.NDArray[Any], Mask]:
        """Return the merged values `[K, H, W]`, and where there are any `[H, W]`."""
        valid = block[1] > 0
        return block[0] / np.where(valid, block[1], 1), valid


class Centre:
    """The chip in which a pixel is nearest the centre, by the product of its distances to the nearer edges.

    A block has values `[K, H, W]`, and their keys `[H, W]`, 0 (or -1, in older files) without a chip; the greater key
    wins. Of equally near chips that is the one with the lower position; the order in which chips are added does not
    matter. The methods are those of `Blend`.
    """

    def weights(self, shape: tuple[int, int], position: int) -> npt.NDArray[Any]:
        """Keys: the product of distances, then the position, lower ones greater."""
        return _centrality(shape) - position

    def add(self, block: Arrays, values: npt.NDArray[Any], weights: npt.NDArray[Any], valid: Mask) -> None:
        """Replace pixels with lower keys."""
        better = valid & (weights > block[1])
        np.copyto(block[0], values, where=better, casting="same_kind")
        np.copyto(block[1], weights, where=better)

    def combine(self, block: Arrays, other: Arrays) -> None:
        """Replace pixels with lower keys."""
        self.add(block, other[0], other[1], other[1] > 0)

    def result(self, block: Arrays) -> tuple[npt.NDArray[Any], Mask]:
        """Values, unchanged."""
        return block[0], block[1] > 0


_MERGING: dict[str, Blend | Centre] = {"blend": Blend(), "centre": Centre()}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """What a map holds; known with the first chip, and the same for all chips of a map."""

    output: Output  #: What the file holds.
    merge: Merge  #: How overlapping chips are merged.
    class_indices: bool  #: Whether chips are class indices `[1, H, W]`; else scores `[K, H, W]`.
    channels: int  #: K.
    dtype: str  #: Dtype of the file.
    nodata: float  #: The file's value where nothing was predicted.
    block: int  #: Side of a block in pixels.

    @classmethod
    def for_predictions(
        cls, channels: int, class_indices: bool, *, output: Output, merge: Merge, nodata: int | None, block: int
    ) -> OutputSpec:
        """Return the spec of a map of predictions `[B, channels, H, W]`; refuse options that contradict them."""
        if class_indices and (merge == "blend" or output == "scores"):
            raise UsageError(
                f"output={output!r} with merge={merge!r} needs scores, and the model returns class indices; return "
                "scores [B, K, H, W] (floating point), or choose output='classes' and merge='centre'."
            )
        if output == "scores":
            dtype, value = "float32", float("nan")
        else:
            classes = 0 if class_indices else max(2, channels)
            dtype = "uint8" if classes <= 255 and (nodata is None or nodata <= 255) else "uint16"
            value = float(np.iinfo(dtype).max if nodata is None else nodata)
            if value < classes:
                raise UsageError(f"nodata must not be one of the {classes} classes, got {nodata}.")
        # `Centre` needs only the class of each chip.
        class_indices = class_indices or (output == "classes" and merge == "centre")
        return cls(
            output=output,
            merge=merge,
            class_indices=class_indices,
            channels=1 if class_indices else channels,
            dtype=dtype,
            nodata=value,
            block=block,
        )

    @property
    def merging(self) -> Blend | Centre:
        """How chips are merged into blocks."""
        return _MERGING[self.merge]

    @property
    def layout(self) -> Layout:
        """Layout of a block to which chips may still be added."""
        values, weights = ("float32", "float32") if self.merge == "blend" else (self.dtype, "int64")
        square = self.block, self.block
        return ((self.channels, *square), values), (square, weights)

    @property
    def rendered_layout(self) -> Layout:
        """Layout of a finished block: the file's pixels."""
        channels = self.channels if self.output == "scores" else 1
        return (((channels, self.block, self.block), self.dtype),)

    def chip_values(self, predicted: npt.NDArray[Any], valid: Mask) -> npt.NDArray[Any]:
        """Convert predictions `[B, K, H, W]` to what is merged: float32 scores, or classes of the file's dtype.

        Pixels that are not `valid` `[B, H, W]` may hold anything. Raises UsageError for classes that do not fit.
        """
        if not self.class_indices:
            return predicted.astype(np.float32, copy=False)
        if predicted.dtype.kind == "f":
            predicted = _classes(predicted, axis=1)
        predicted = np.where(valid[:, None], predicted, predicted.dtype.type(0))
        low, high = int(predicted.min(initial=0)), int(predicted.max(initial=0))
        if low < 0 or high > np.iinfo(self.dtype).max or bool((predicted[valid[:, None]] == self.nodata).any()):
            raise UsageError(
                f"Classes must fit a {self.dtype} map with nodata {self.nodata:g}, got {low} to {high}; choose another "
                "nodata= (above 255 the map is uint16)."
            )
        return predicted.astype(self.dtype)

    def render(self, block: Arrays) -> npt.NDArray[Any]:
        """Return the file's pixels `[C, H, W]` of a block."""
        values, valid = self.merging.result(block)
        if self.output == "classes" and not self.class_indices:
            values = _classes(values, axis=0)
        return np.where(valid, values, np.array(self.nodata).astype(self.dtype)).astype(self.dtype)


def _classes(scores: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """The class with the highest score, axis kept; of a single channel, whether it is above the threshold."""
    if scores.shape[axis] == 1:
        return (scores > _THRESHOLD).astype(np.int64)
    classes: npt.NDArray[Any] = scores.argmax(axis=axis, keepdims=True)
    return classes
