"""`trainer.predict` to a map."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DistributedSampler

from rasteret_ml.errors import UsageError
from rasteret_ml.predict.blend import Merge, Output
from rasteret_ml.predict.mosaic_layout import SubsetSampler
from rasteret_ml.predict.prediction_map import BLOCK, MEMORY_BYTES, SAVE_SECONDS, PredictionMap
from rasteret_ml.predict.progress import data_digest, weights_digest
from rasteret_ml.predict.write_cog import Colour
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.sample import Sample

__all__ = ["MapWriter"]

_log = logging.getLogger(__name__)


class MapWriter(pl.Callback):
    """Writes what `trainer.predict` predicts as a Cloud Optimized GeoTIFF; see `PredictionMap` for how it is made.

        writer = rm.MapWriter("map.tif", merge="blend")
        pl.Trainer(callbacks=[writer]).predict(task, datamodule=data)
        print(writer.paths)

    With a `RasteretDataModule`, a run that was ended goes on where it was, on any number of devices; these share the
    chips whatever `use_distributed_sampler` is. `predict_step` gives scores `[B, K, H, W]` or `[B, H, W]` (as
    TorchGeo's tasks do), or classes `[B, H, W]`. Predictions are not kept in memory: `trainer.predict` returns None.

    Where `limit_predict_batches` leaves chips out, no map is written: what there is is kept for the next run.

    Args:
        path: The file.
        key: Where `predict_step` gives a dictionary: the key of the predictions in it; default as TorchGeo 0.10 has it.
        sampler: The loader's `GridAOISampler`, where no datamodule is used. Such a run goes on as well, but its loader
            reads, and the model predicts, all chips again. On several devices use a datamodule.
        output: "classes" or "scores".
        merge: Of overlapping chips: "blend" or "centre".
        names: Of the classes, or of the bands of scores.
        colours: Class to (red, green, blue).
        nodata: Value of a map of classes where nothing was predicted.
        version: Tells models apart, so that a map is not finished with another one than it was begun with; default a
            digest of the weights.
        memory_bytes: Memory for blocks in use.
        save_seconds: How often what was predicted is made to last; 0 = after each batch.
        block: Side of the file's tiles, in pixels.
        resume: Go on with what an earlier run left; False = begin anew.

    Raises:
        UsageError: as for `PredictionMap`, or neither a datamodule with a `predict_sampler` nor `sampler`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: str = "probabilities",
        sampler: Any = None,
        output: Output = "classes",
        merge: Merge = "blend",
        names: Sequence[str] = (),
        colours: Mapping[int, Colour] | None = None,
        nodata: int | None = None,
        version: str | None = None,
        memory_bytes: int = MEMORY_BYTES,
        save_seconds: float = SAVE_SECONDS,
        block: int = BLOCK,
        resume: bool = True,
    ) -> None:
        self.path = os.fspath(path)
        self._key, self._sampler, self._version = key, sampler, version
        self._options: dict[str, Any] = {
            "output": output,
            "merge": merge,
            "names": names,
            "colours": colours,
            "nodata": nodata,
            "memory_bytes": memory_bytes,
            "save_seconds": save_seconds,
            "block": block,
            "resume": resume,
        }
        self._map: PredictionMap | None = None
        self._begin: Callable[[], PredictionMap] | None = None
        self._whole: Any = None
        self.paths: list[str] = []
        """The maps that were written."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find out what is left to predict, before the loader is made."""
        if stage != "predict":
            return
        data = trainer.datamodule
        own = getattr(data, "predict_sampler", None)
        sampler = self._sampler if own is None else own
        if sampler is None:
            raise UsageError(
                "MapWriter needs to know the chips: predict with a RasteretDataModule, or give it the loader's "
                "GridAOISampler as sampler=."
            )
        # Kept predictions would fill the memory.
        trainer.predict_loop.return_predictions = False
        self.paths = []
        self._begin = functools.partial(self._begun, pl_module, sampler, data)
        if own is not None:
            self._whole, data.predict_sampler = own, _WhatIsLeft(self._opened)

    def _begun(self, pl_module: Any, sampler: Any, data: Any) -> PredictionMap:
        version = weights_digest(pl_module) if self._version is None else self._version
        images = data_digest(getattr(data, "images", None))
        return PredictionMap(self.path, sampler, version=version, data=images, **self._options)

    def _opened(self) -> PredictionMap:
        """The map; it is begun when the loader is made: `ckpt_path`'s weights are there by then, in `setup` not yet."""
        if self._map is None:
            assert self._begin is not None
            self._map = self._begin()
        return self._map

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the map, where no datamodule has."""
        self._opened()

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the batch on the map."""
        if dataloader_idx:
            raise UsageError("MapWriter writes the map of one predict loader, and there are several.")
        assert self._map is not None
        self._map.add(batch, self._predictions(outputs))

    def _predictions(self, outputs: Any) -> torch.Tensor:
        if isinstance(outputs, Mapping):
            if self._key not in outputs:
                raise UsageError(f"predict_step gives {sorted(map(str, outputs))}; say which is it with key=.")
            outputs = outputs[self._key]
        found: torch.Tensor = outputs
        return found

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the map."""
        assert self._map is not None
        left = 0 if trainer.limit_predict_batches == 1.0 else self._map.count_missing()
        if left:
            _log.warning("%s is not written: limit_predict_batches left %d chips out; run again", self.path, left)
            return
        self.paths = self._map.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what was predicted."""
        self._leave(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close files; the datamodule covers everything again."""
        if stage == "predict":
            self._leave(trainer)

    def _leave(self, trainer: Any) -> None:
        if self._map is not None:
            self._map.save()
            self._map.close()
        self._map = self._begin = None
        if self._whole is not None:
            trainer.datamodule.predict_sampler = self._whole
            self._whole = None


class _WhatIsLeft(DistributedSampler[AOI]):
    """The chips of a map that is begun when they are first asked for; Lightning leaves it as it is."""

    def __init__(self, opened: Callable[[], PredictionMap]) -> None:
        self._opened = opened
        self._chips: SubsetSampler | None = None

    def _found(self) -> SubsetSampler:
        if self._chips is None:
            self._chips = self._opened().sampler
        return self._chips

    def __len__(self) -> int:
        return len(self._found())

    def __iter__(self) -> Iterator[AOI]:
        return iter(self._found())

    def set_epoch(self, epoch: int) -> None:
        """Predictions have none."""
