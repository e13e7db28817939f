"""Predict all chips of a grid with a model, and write the map chip by chip."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
import torch.utils.data
from affine import Affine
from tqdm import tqdm

from rasteret_ml.errors import RasteretError, UsageError
from rasteret_ml.predict.blend import Merge, Output, OutputSpec
from rasteret_ml.predict.mosaic_layout import SubsetSampler, map_extents, map_paths
from rasteret_ml.predict.rank_shard import (
    RankShard,
    data_digest,
    missing_positions,
    run_fingerprint,
    shard_folder,
    start_or_resume,
    weights_digest,
)
from rasteret_ml.predict.write_cog import Colour, checked_colours, write_maps
from rasteret_ml.samplers.ranks import Ranks
from rasteret_ml.samples.sample import Sample
from rasteret_ml.transforms.device import to_device

_log = logging.getLogger(__name__)


class DistributedGroup(Ranks):
    """The ranks and their collective operations, each of which all ranks call at the same time."""

    def share(self, value: Any, error: Exception | None = None) -> list[Any]:
        """Return the values of all ranks, in their order; an error of any rank is raised on all."""
        own = value, None if error is None else f"{type(error).__name__}: {error}"
        shared: list[Any] = [own] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(shared, own)
        if error is not None:
            raise error
        failed = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(shared) if message is not None]
        if failed:
            raise RasteretError(f"Another rank failed; the predicted chips are kept. {'; '.join(failed)}")
        return [value for value, _ in shared]

    def call(self, function: Callable[[], Any]) -> list[Any]:
        """Call a function on each rank, and share results and errors."""
        try:
            value = function()
        except Exception as error:
            return self.share(None, error)
        return self.share(value)

    def call_on_rank_0(self, function: Callable[[], Any]) -> Any:
        """Return the result of a function, called on rank 0, on all ranks."""
        return self.call(lambda: function() if self.rank == 0 else None)[0]


class PredictionMap:
    """A georeferenced map of a model's predictions for a grid of chips, written as a Cloud Optimized GeoTIFF.

        with PredictionMap("map.tif", sampler) as prediction_map:
            for batch in rm.DataLoader(dataset, 16, sampler=prediction_map.sampler):
                prediction_map.add(batch, model(normalize(batch)["image"]))
            prediction_map.finish()

    Memory does not grow with the map: at most `memory_bytes` of blocks are in memory, the rest is in files in
    `<path>.parts`. These take two to three times the size of the map before compression; with several ranks, for each
    rank, 4 bytes a pixel for each score and 1 more. Rank 0 combines them when all ranks have finished.

    A run that ended early, even by kill -9, continues from its last save: `sampler` yields only the chips that are
    still missing, on any number of ranks. Pixels for which no chip has a valid value are nodata.

    A dataset with several target grids (`grid="native"`) makes a map for each. There a chip may be a fraction of a
    pixel off its map; its pixels are put on the nearest ones.

    Args:
        path: The file, writable by all ranks; missing folders are created, an older file is replaced at the end. If
            there are several maps, each has its EPSG code before the suffix.
        sampler: A `GridAOISampler`; the map covers its polygons, or all of its dataset.
        output: "classes": the class with the highest score (for a single channel: score > 0.5) as uint8, or uint16
            with more than 255 classes. "scores": one float32 band for each channel, nodata NaN.
        merge: "blend": the mean of the scores of overlapping chips, weighted with a window that falls to the chips'
            edges. "centre": each pixel from the one chip in which it is nearest the centre.
        names: Names of the classes in order (the file's tag `classes`), or of the bands of scores.
        colours: (red, green, blue) of each class, for the file's colour table.
        nodata: Value where nothing was predicted in a map of classes; default 255, or 65535 for uint16.
        version: Identifies the model; a run is continued only with the same one.
        data: Identifies the data, likewise.
        memory_bytes: Memory for blocks.
        save_seconds: Seconds between saves; 0 saves after each batch.
        block: Side of the file's tiles, and of the blocks in memory, in pixels; a multiple of 16, at least 128.
        resume: Continue an earlier run; False = start over.

    Raises:
        UsageError: Another kind of sampler, contradicting options, or another process that writes the same map.
        ResumeError: There is an unfinished map of another run; the message names each difference.
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
        memory_bytes: int = 256 * 1024 * 1024,
        save_seconds: float = 60.0,
        block: int = 256,
        resume: bool = True,
    ) -> None:
        _validate_options(output, merge, nodata, block)
        self._options: dict[str, Any] = {"output": output, "merge": merge, "nodata": nodata, "block": int(block)}
        self._legend = tuple(str(name) for name in names), checked_colours(colours, output)
        self._memory_bytes, self._save_seconds = int(memory_bytes), float(save_seconds)
        self._extents = map_extents(sampler, int(block))
        self._total = sum(len(extent.positions) for extent in self._extents)
        self._paths = map_paths(path, self._extents)
        self._folder = Path(f"{os.fspath(path)}.parts")
        self._group = DistributedGroup.now()
        fingerprint = run_fingerprint(sampler, self._extents, **self._options, version=version, data=data)
        missing = self._group.call_on_rank_0(partial(self._start, fingerprint, resume))
        if len(missing) < self._total:
            _log.info("%s: resuming, %d of %d chips are missing", self._folder, len(missing), self._total)
        own = missing[self._group.rank :: self._group.count]
        self._own = np.zeros(self._total, bool)
        self._own[own] = True
        # An empty loader on one rank stops Lightning on all ranks: it reads a chip of another rank, which is ignored.
        #: The chips that this rank has to predict (an ignored one if there are none).
        self.sampler = SubsetSampler(sampler, own if len(own) else np.array([0]))
        self._shard: RankShard | None = None
        self._saved_at = time.monotonic()
        self._is_finishing = False

    def _start(self, fingerprint: Mapping[str, str], resume: bool) -> npt.NDArray[np.int64]:
        """Start or resume the run; return the missing positions."""
        if not resume and self._folder.exists():
            shutil.rmtree(self._folder)
        start_or_resume(self._folder, fingerprint)
        return missing_positions(self._folder, self._total)

    @property
    def chip_count(self) -> int:
        """Number of chips that this rank had to predict at the start."""
        return int(self._own.sum())

    def count_missing(self) -> int:
        """Return how many chips are still to be predicted by all ranks together; all ranks call it."""
        done = np.zeros(self._total, bool) if self._shard is None else self._shard.done
        return int(sum(self._group.share(int((self._own & ~done).sum()))))

    def add(self, batch: Sample, predictions: torch.Tensor) -> None:
        """Put a batch's predictions on the map.

        Args:
            batch: The batch from the loader: `draw` identifies the chips, `transform` says where they lie,
                `mask_valid` (in a time series: of any date) and `mask_aoi` which pixels count.
            predictions: Scores `[B, K, H, W]` or `[B, H, W]` of any floating-point dtype, or, with `merge="centre"`,
                class indices `[B, H, W]` of any integer dtype. A pixel with a score that is not finite is ignored.

        Raises:
            UsageError: The batch has no `draw` or `transform`, or the predictions have another shape.
        """
        if not {"draw", "transform"} <= batch.keys():
            raise UsageError(
                "The batch must have 'draw' and 'transform' to place it; load it with this map's .sampler."
            )
        positions = batch["draw"].reshape(-1, 3)[:, 2].tolist()
        own = [i for i, position in enumerate(positions) if 0 <= position < self._total and self._own[position]]
        predictions = self._check_predictions(predictions, len(positions))
        if not own:
            return
        shard = self._open_shard(predictions)
        valid = _valid_pixels(batch, predictions)[own]
        if len(own) < len(positions):
            predictions = predictions[own]
        if predictions.is_floating_point():
            # On the device, so that one channel is copied from it and not all.
            is_class = shard.spec.class_indices and predictions.shape[1] > 1
            predictions = predictions.argmax(1, keepdim=True) if is_class else predictions.float()
        values = shard.spec.chip_values(predictions.cpu().numpy(), valid)
        transforms = batch["transform"].tolist()
        for i, at in enumerate(own):
            shard.add(positions[at], values[i], valid[i], Affine(*transforms[at][:6]))
        if time.monotonic() - self._saved_at >= self._save_seconds:
            self.save()

    def _check_predictions(self, predictions: torch.Tensor, count: int) -> torch.Tensor:
        """Predictions as `[B, K, H, W]`."""
        if not isinstance(predictions, torch.Tensor):
            raise UsageError(
                f"Predictions must be a tensor [B, K, H, W] or [B, H, W], got a {type(predictions).__name__}."
            )
        height, width = self._extents[0].chip_size
        shape = list(predictions.shape)
        predictions = predictions[:, None] if predictions.dim() == 3 else predictions
        if predictions.dim() != 4 or (len(predictions), *predictions.shape[2:]) != (count, height, width):
            raise UsageError(
                f"Predictions of {count} chips of {height} x {width} pixels must have shape "
                f"[{count}, K, {height}, {width}], got {shape}."
            )
        if not predictions.is_floating_point() and predictions.shape[1] != 1:
            raise UsageError(f"{predictions.dtype} predictions must be class indices [B, H, W], got shape {shape}.")
        return predictions.detach()

    def _open_shard(self, predictions: torch.Tensor) -> RankShard:
        """The rank's shard, opened with the first predictions."""
        spec = OutputSpec.for_predictions(predictions.shape[1], not predictions.is_floating_point(), **self._options)
        names = self._legend[0]
        if spec.output == "scores" and names and len(names) != spec.channels:
            raise UsageError(f"names must have one name for each of {spec.channels} scores, got {len(names)} names.")
        if self._shard is None:
            folder = shard_folder(self._folder, self._group.rank)
            self._shard = RankShard(folder, self._extents, spec, self._memory_bytes)
        elif repr(spec) != repr(self._shard.spec):
            raise UsageError(f"The model must always return the same, got {spec} after {self._shard.spec}.")
        return self._shard

    def save(self) -> None:
        """Make all added chips durable: a run that ends after this continues from here."""
        if self._shard is not None:
            self._shard.save()
        self._saved_at = time.monotonic()

    def finish(self, *, allow_missing: bool = False) -> list[str]:
        """Write the maps from the shards of all ranks and remove `<path>.parts`; all ranks call it and wait for rank 0.

        Args:
            allow_missing: Write maps even if chips are missing: they are nodata, and the run cannot be continued.

        Returns:
            The paths of the maps, on each rank.

        Raises:
            UsageError: Chips are missing; those that were predicted are kept, so that another run can continue.
        """
        self._is_finishing = True
        self._group.call(self._save_and_close)
        self._group.call_on_rank_0(partial(self._write, allow_missing))
        return self._paths

    def _save_and_close(self) -> None:
        self.save()
        self.close()

    def _write(self, allow_missing: bool) -> None:
        missing = missing_positions(self._folder, self._total)
        if len(missing) and (len(missing) == self._total or not allow_missing):
            examples = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
            raise UsageError(
                f"{len(missing)} of {self._total} chips of {self._paths[0]} are missing (positions {examples}). "
                f"Run again with the same arguments to continue from {self._folder}."
            )
        write_maps(self._folder, self._extents, self._paths, self._legend)
        shutil.rmtree(self._folder)
        _log.info("wrote %s", ", ".join(self._paths))

    def close(self) -> None:
        """Close this rank's files without saving."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def __enter__(self) -> PredictionMap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Save what was added, also after an error; the other ranks learn of the error when they finish."""
        self._save_and_close()
        if isinstance(error, Exception) and not self._is_finishing:
            if self._group.count > 1:  # the error itself is raised when the other ranks get here
                _log.error("rank %d: %s: %s", self._group.rank, type(error).__name__, error)
            self._group.share(None, error)


def _valid_pixels(batch: Sample, predictions: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Where predictions count `[B, H, W]`."""
    valid: npt.NDArray[np.bool_] = torch.isfinite(predictions).all(1).cpu().numpy()
    for key in ("mask_valid", "mask_aoi"):
        if key in batch:
            mask = batch[key].cpu().numpy()
            while mask.ndim > 4:
                mask = mask.any(axis=1)  # any date of a time series
            valid &= mask if mask.ndim == 3 else mask.all(axis=1)
    return valid


def _validate_options(output: str, merge: str, nodata: int | None, block: int) -> None:
    if output not in ("classes", "scores"):
        raise UsageError(f"output must be 'classes' or 'scores', got {output!r}.")
    if merge not in ("blend", "centre"):
        raise UsageError(f"merge must be 'blend' or 'centre', got {merge!r}.")
    if block < 128 or block % 16:
        raise UsageError(f"block must be a multiple of 16 pixels and >= 128, got {block}.")
    if nodata is not None and output == "scores":
        raise UsageError("nodata must not be given with output='scores': the nodata of scores is NaN.")
    if nodata is not None and not 0 <= nodata <= 65535:
        raise UsageError(f"nodata must be from 0 to 65535, got {nodata}.")


def predict_map(
    model: Callable[[torch.Tensor], torch.Tensor],
    data: Any,
    path: str | os.PathLike[str],
    *,
    normalize: Callable[[Sample], Sample] | None = None,
    version: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> list[str]:
    """Predict all chips of a grid and write the map; see `PredictionMap` for the file, and for how a run continues.

        rm.predict_map(model, data, "map.tif", names=["water", "forest"])

    In a torch process group each rank makes this call and predicts its share of the chips; all return when the map is
    written.

    Args:
        model: From images `[B, C, H, W]` to scores `[B, K, H, W]` or `[B, H, W]`, or class indices `[B, H, W]`. A
            `torch.nn.Module` is in evaluation mode during the call.
        data: A `RasteretDataModule` (its predict loader and normalization), or a DataLoader whose sampler is a
            `GridAOISampler`. With a stride below their size chips overlap.
        path: The file.
        normalize: Applied to each batch on the device; returns one with a float `image`, such as
            `functools.partial(rm.normalize, mean=mean, std=std)`. Default: the datamodule's own, otherwise images are
            only converted to float32.
        version: Identifies the model, so that another model does not continue its map; default a digest of a Module's
            weights.
        device: Device of the model; default the device of its weights.
        progress: Show a progress bar; default in a terminal.
        options: Options of `PredictionMap`: `output`, `merge`, `names`, `colours`, `nodata`, `memory_bytes`,
            `save_seconds`, `block`, `resume`.

    Returns:
        The paths of the maps: one for each target grid of the dataset (several only on native grids).

    Raises:
        UsageError: As for `PredictionMap`, or the loader has no `GridAOISampler`, or replaces chips that it cannot
            read, which would leave holes.
    """
    loader, own_normalize = _resolve_loader(data)
    if getattr(getattr(loader, "errors", None), "action", None) == "replace":
        raise UsageError("errors must not be 'replace' for a map, it leaves holes; choose 'fill' (nodata) or 'retry'.")
    normalize = normalize or own_normalize or (lambda batch: batch | {"image": batch["image"].float()})
    if device is None:
        tensors = (*model.parameters(), *model.buffers()) if isinstance(model, torch.nn.Module) else ()
        device = next((tensor.device for tensor in tensors), "cpu")
    device = torch.device(device)
    options.setdefault("data", data_digest(loader.dataset))
    version = weights_digest(model) if version is None else version
    with PredictionMap(path, loader.sampler, version=version, **options) as prediction_map:
        if prediction_map.chip_count:
            total, hidden = prediction_map.chip_count, None if progress is None else not progress
            bar = tqdm(total=total, unit="chip", desc=os.path.basename(path), disable=hidden)
            with bar, _evaluation_mode(model), torch.inference_mode():
                for batch in _with_sampler(loader, prediction_map.sampler):
                    prediction_map.add(batch, model(normalize(to_device(batch, device))["image"]))
                    bar.update(len(batch["draw"]))
        return prediction_map.finish()


def _resolve_loader(data: Any) -> tuple[torch.utils.data.DataLoader[Any], Callable[[Sample], Sample] | None]:
    """The loader, and the normalization of a datamodule."""
    normalize = None
    if hasattr(data, "predict_dataloader"):
        data.setup("predict")
        data, normalize = data.predict_dataloader(), lambda batch, module=data: module.on_after_batch_transfer(batch, 0)
    if not isinstance(data, torch.utils.data.DataLoader) or data.batch_size is None:
        raise UsageError(
            "data must be a RasteretDataModule, or a DataLoader with a batch_size and a GridAOISampler, got a "
            f"{type(data).__name__}."
        )
    return data, normalize


def _with_sampler(loader: torch.utils.data.DataLoader[Any], sampler: Any) -> torch.utils.data.DataLoader[Any]:
    """A copy of a loader with another sampler."""
    classes = torch.utils.data.DataLoader, type(loader)
    names = [name for kind in classes for name in inspect.signature(kind.__init__).parameters]
    excluded = {"self", "sampler", "batch_sampler", "shuffle", "drop_last"}
    if not loader.num_workers:
        excluded |= {"prefetch_factor", "multiprocessing_context", "persistent_workers", "timeout"}
    arguments = {name: getattr(loader, name) for name in names if name not in excluded and hasattr(loader, name)}
    return type(loader)(**arguments, sampler=sampler)


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Put a Module in evaluation mode, and each of its parts back afterwards."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
