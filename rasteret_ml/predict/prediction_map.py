"""A map in the making: chips go in as they are predicted, a COG comes out."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from affine import Affine

from rasteret_ml.errors import RasteretError, UsageError
from rasteret_ml.predict.blend import Merge, merging
from rasteret_ml.predict.join_shards import join_parts, part_folder, unpredicted
from rasteret_ml.predict.mosaic_layout import SubsetSampler, sheet_paths, sheets_of
from rasteret_ml.predict.output_spec import Output, OutputSpec
from rasteret_ml.predict.rank_shard import DistributedGroup, RankShard
from rasteret_ml.predict.resume import run_fingerprint, start_or_resume
from rasteret_ml.predict.write_cog import Colour, checked_colours
from rasteret_ml.samples.sample import Sample

__all__ = ["BLOCK", "MEMORY_BYTES", "SAVE_SECONDS", "PredictionMap"]

MEMORY_BYTES = 256 * 1024 * 1024
SAVE_SECONDS = 60.0
BLOCK = 256

_log = logging.getLogger(__name__)


class PredictionMap:
    """A georeferenced map of a model's predictions for the chips of a grid, written as a Cloud Optimized GeoTIFF.

        with rm.PredictionMap("map.tif", sampler) as found:
            for batch in rm.DataLoader(dataset, 16, sampler=found.sampler):
                found.add(batch, model(prepare(batch)["image"]))
            found.finish()

    Memory does not grow with the map: `memory_bytes` for blocks in use, the rest lies in files in `<path>.parts`
    beside it: some two or three times the map before compression, and with several ranks, for each of them, four bytes
    a pixel for each score and one more. Each file is a rank's own; rank 0 joins them when all have finished.

    A run that was ended in any way goes on from what was saved last: `sampler` then gives only the chips that are still
    to be predicted, with the same or another number of ranks. Pixels that no chip has a valid value for are nodata.

    A dataset of several frames (`grid="native"`) gives a map for each. There, a chip whose pixels lie a part of a pixel
    beside the map's is put on the nearest ones.

    Args:
        path: The file, where all ranks can write; missing folders are made, an older file is replaced at the end. Of
            several maps, each has its EPSG code before the suffix.
        sampler: A `GridAOISampler`: the map covers its polygons, or all of its dataset.
        output: "classes": uint8 (uint16 for more than 255 classes): the plane with the highest score, or of a single
            plane whether it is above 0.5; "scores": float32, a band for each plane, NaN = nodata.
        merge: "blend": the mean of overlapping chips' scores, weighted with a window that falls to a chip's edges;
            "centre": each pixel from the one chip in which it is nearest the middle, nothing mixed.
        names: Of the classes in order (tag `classes` of the file), or of the bands of scores.
        colours: Class to (red, green, blue), as the file's colour table.
        nodata: Value of a map of classes where nothing was predicted; default the type's greatest, 255 or 65535.
        version: Tells models apart: a run goes on only where it is the same.
        data: Tells data apart, likewise.
        memory_bytes: Memory for blocks in use.
        save_seconds: How often what was predicted is made to last; 0 = after each batch.
        block: Side of the file's tiles, and of the blocks in memory, in pixels; a multiple of 16, at
            least 128.
        resume: Go on with what an earlier run left; False = begin anew.

    Raises:
        UsageError: another sampler, options that contradict each other, or another process at work on the same map.
        ResumeError: an unfinished map of another plan; the message names each difference.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sampler: Any,
        *,
        output: Output = "classes",
        merge: Merge = "blend",
        names: Sequence[str] = (),
        colours: Mapping[int, Colour] | None = None,
        nodata: int | None = None,
        version: str = "",
        data: str = "",
        memory_bytes: int = MEMORY_BYTES,
        save_seconds: float = SAVE_SECONDS,
        block: int = BLOCK,
        resume: bool = True,
    ) -> None:
        _check(output, merge, nodata, block)
        self._output, self._merge, self._nodata, self._block = output, merge, nodata, int(block)
        self._legend = tuple(str(name) for name in names), checked_colours(colours, output)
        self._memory_bytes, self._save_seconds = int(memory_bytes), float(save_seconds)
        self._sheets = sheets_of(sampler, self._block)
        self._total = sum(len(sheet.positions) for sheet in self._sheets)
        self._paths = sheet_paths(path, self._sheets)
        self._folder = Path(f"{os.fspath(path)}.parts")
        self._crew = DistributedGroup.now()
        facts = run_fingerprint(
            sampler,
            self._sheets,
            output=output,
            merge=merge,
            nodata=nodata,
            block=self._block,
            version=version,
            data=data,
        )
        left = self._agree(facts, resume)
        own = left[self._crew.rank :: self._crew.count]
        self._own = np.zeros(self._total, bool)
        self._own[own] = True
        # An empty loader on one rank stops Lightning on all: a chip that is not this rank's is read, and left out.
        self.sampler = SubsetSampler(sampler, own if len(own) else np.array([0]))
        """The chips that this rank has still to predict (one that does not count, where there are none)."""
        self._part: RankShard | None = None
        self._saved_at = time.monotonic()
        self._settled = False

    def _agree(self, facts: Mapping[str, str], resume: bool) -> npt.NDArray[np.int64]:
        """The same plan on all ranks; gives the positions that none of them has."""
        error, left = None, None
        if self._crew.rank == 0:
            try:
                if not resume and self._folder.exists():
                    shutil.rmtree(self._folder)
                start_or_resume(self._folder, facts)
                left = unpredicted(self._folder, self._total)
            except Exception as raised:
                error = raised
        _raise_together(self._crew, error)
        found: npt.NDArray[np.int64] = self._crew.broadcast(left)
        if len(found) < self._total:
            _log.info("%s: going on, %d of %d chips are left", self._folder, len(found), self._total)
        return found

    @property
    def to_do(self) -> int:
        """Chips that this rank had to predict when it began."""
        return int(self._own.sum())

    def add(self, batch: Sample, predictions: torch.Tensor) -> None:
        """Put a batch's predictions on the map.

        Args:
            batch: As the loader gave it: `draw` says which chips, `transform` where they lie, `mask_valid` (of a time
                series: of any date) and `mask_aoi` which pixels count.
            predictions: Scores `[B, K, H, W]` or `[B, H, W]` of any floating-point type, or classes `[B, H, W]` of any
                integer type, for `merge="centre"`. A pixel with a score that is not finite does not count.

        Raises:
            UsageError: a batch without `draw`, or predictions of another shape.
        """
        if "draw" not in batch:
            raise UsageError("The batch does not say which chips it has ('draw'); load it with this map's .sampler.")
        positions = batch["draw"].reshape(-1, 3)[:, 2].tolist()
        counted = [i for i, at in enumerate(positions) if 0 <= at < self._total and self._own[at]]
        scores = self._planes(predictions, len(positions), batch)
        if not counted:
            return
        part = self._opened(scores)
        valid = _valid_of(batch, scores)[counted]
        values = self._values(scores if len(counted) == len(positions) else scores[counted], valid)
        transforms = batch["transform"].tolist() if "transform" in batch else None
        for i, at in enumerate(counted):
            place = None if transforms is None else Affine(*transforms[at][:6])
            part.add(positions[at], values[i], valid[i], place)
        if time.monotonic() - self._saved_at >= self._save_seconds:
            self.save()

    def _planes(self, predictions: torch.Tensor, count: int, batch: Sample) -> torch.Tensor:
        if not isinstance(predictions, torch.Tensor):
            raise UsageError(f"Predictions are a tensor [B, K, H, W] or [B, H, W], not a {type(predictions).__name__}.")
        height, width = self._sheets[0].size
        planes = predictions[:, None] if predictions.dim() == 3 else predictions
        if planes.dim() != 4 or len(planes) != count or tuple(planes.shape[2:]) != (height, width):
            raise UsageError(
                f"Predictions of {count} chips of {height} x {width} pixels are [{count}, K, {height}, {width}], not "
                f"{list(predictions.shape)}."
            )
        if not planes.is_floating_point() and planes.shape[1] != 1:
            raise UsageError(f"{planes.dtype} {list(predictions.shape)} are neither classes [B, H, W] nor scores.")
        return planes.detach()

    def _values(self, planes: torch.Tensor, valid: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        assert self._part is not None
        form = self._part.form
        if planes.is_floating_point():
            # On the device, so that one plane leaves it and not all.
            planes = planes.argmax(1, keepdim=True) if form.labels and planes.shape[1] > 1 else planes.float()
        return form.values(planes.cpu().numpy(), valid)

    def _opened(self, planes: torch.Tensor) -> RankShard:
        labels = not planes.is_floating_point()
        form = OutputSpec.of(
            planes.shape[1], labels, output=self._output, merge=self._merge, nodata=self._nodata, block=self._block
        )
        names = self._legend[0]
        if self._output == "scores" and names and len(names) != form.planes:
            raise UsageError(f"The model gives {form.planes} scores a pixel, and there are {len(names)} names.")
        if self._part is None:
            folder = part_folder(self._folder, self._crew.rank)
            self._part = RankShard(folder, self._sheets, form, self._memory_bytes)
        elif repr(form) != repr(self._part.form):
            raise UsageError(f"The model gave {self._part.form} before, and {form} now.")
        return self._part

    def save(self) -> None:
        """Make all that was added last: a run that is ended after this goes on from here."""
        if self._part is not None:
            self._part.save()
        self._saved_at = time.monotonic()

    def finish(self, *, partial: bool = False) -> list[str]:
        """Join what all ranks have, write the maps, and remove `<path>.parts`; all ranks call it, and wait for rank 0.

        Args:
            partial: Write maps also where chips are missing; they are nodata, and what is there is not kept for later.

        Returns:
            The paths of the maps, on each rank.

        Raises:
            UsageError: chips are missing; what is there is kept, so that another run can go on.
        """
        error: Exception | None = None
        try:
            self.save()
            self.close()
        except Exception as raised:
            error = raised
        self._settle(error)
        if self._crew.rank == 0:
            try:
                self._join(partial)
            except Exception as raised:
                error = raised
        _raise_together(self._crew, error)
        return self._paths

    def _settle(self, error: BaseException | None) -> None:
        """All ranks have saved, or one of them has failed: then all fail."""
        if self._settled:
            return
        self._settled = True
        told = self._crew.all_gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
        if failed:
            raise RasteretError(f"The map is not finished, but what was predicted is kept. {'; '.join(failed)}")

    def _join(self, partial: bool) -> None:
        missing = unpredicted(self._folder, self._total)
        if len(missing) and (len(missing) == self._total or not partial):
            listed = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
            raise UsageError(
                f"{len(missing)} of {self._total} chips of {self._paths[0]} are not predicted (positions {listed}). "
                f"Run it again with the same arguments to go on from {self._folder}."
            )
        join_parts(self._folder, self._sheets, self._paths, self._legend)
        shutil.rmtree(self._folder)
        _log.info("written: %s", ", ".join(self._paths))

    def left(self) -> int:
        """Chips that are still to be predicted, of all ranks together; all ranks call it."""
        done = np.zeros(self._total, bool) if self._part is None else self._part.done
        return int(sum(self._crew.all_gather(int((self._own & ~done).sum()))))

    def close(self) -> None:
        """Close this rank's files, without saving."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def __enter__(self) -> PredictionMap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was added is saved, also where an error ends the work; other ranks learn of it when they finish."""
        if self._part is not None:
            self.save()
        self.close()
        if isinstance(error, Exception) and not self._settled:
            if self._crew.count > 1:  # the error itself comes when the others have come as far
                _log.error("rank %d: %s: %s", self._crew.rank, type(error).__name__, error)
            self._settle(error)


def _valid_of(batch: Sample, scores: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Where predictions count `[B, H, W]`."""
    if scores.is_floating_point():
        valid = torch.isfinite(scores).all(1).cpu().numpy()
    else:
        valid = np.ones((len(scores), *scores.shape[2:]), bool)
    for key in ("mask_valid", "mask_aoi"):
        if key in batch:
            mask = batch[key].cpu().numpy()
            while mask.ndim > 4:
                mask = mask.any(axis=1)  # of a time series any date
            valid &= mask if mask.ndim == 3 else mask.all(axis=1)
    return valid


def _raise_together(crew: DistributedGroup, error: Exception | None) -> None:
    """What went wrong on rank 0 is an error on all."""
    told = crew.broadcast(None if error is None else str(error))
    if error is not None:
        raise error
    if told is not None:
        raise RasteretError(f"On rank 0: {told}")


def _check(output: str, merge: str, nodata: int | None, block: int) -> None:
    if output not in ("classes", "scores"):
        raise UsageError(f"output is 'classes' or 'scores', not {output!r}.")
    merging(merge, "uint8")
    if block < 128 or block % 16:
        raise UsageError(f"block is a multiple of 16 pixels, at least 128, not {block}.")
    if nodata is not None and output == "scores":
        raise UsageError("nodata= is of a map of classes; scores are NaN where nothing was predicted.")
    if nodata is not None and not 0 <= nodata <= 65535:
        raise UsageError(f"nodata lies between 0 and 65535, not {nodata}.")
