"""A callback that writes what `trainer.predict` predicts as a map."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DistributedSampler

from rasteret_ml.errors import UsageError
from rasteret_ml.predict.mosaic_layout import SubsetSampler
from rasteret_ml.predict.prediction_map import PredictionMap
from rasteret_ml.predict.rank_shard import data_digest, weights_digest
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.sample import Sample

_log = logging.getLogger(__name__)


class MapWriter(pl.Callback):
    """Writes what `trainer.predict` predicts as a Cloud Optimized GeoTIFF, see `PredictionMap`.

        writer = rm.MapWriter("map.tif", merge="blend")
        pl.Trainer(callbacks=[writer]).predict(task, datamodule=data)
        print(writer.paths)

    With a `RasteretDataModule`, an interrupted run is resumed, on any number of devices; these share the chips whatever
    `use_distributed_sampler` is. `predict_step` returns scores `[B, K, H, W]` or `[B, H, W]` (as TorchGeo's tasks do),
    or classes `[B, H, W]`. Predictions are not kept in memory: `trainer.predict` returns None.

    If `limit_predict_batches` skips chips, no map is written; the predictions are kept for the next run.

    Args:
        path: Path of the map.
        key: Key of the predictions where `predict_step` returns a dictionary; default that of TorchGeo 0.10.
        sampler: The loader's `GridAOISampler`, if no datamodule is used. Such a run can be resumed too, but reads and
            predicts all chips again. On several devices use a datamodule.
        version: Identifies the model, so that a map is not finished with another; default a digest of the weights.
        **options: Of `PredictionMap`: `output`, `merge`, `names`, `colours`, `nodata`, `memory_bytes`, `save_seconds`,
            `block`, `resume`.

    Raises:
        UsageError: as for `PredictionMap`; or neither a datamodule with a `predict_sampler` nor `sampler`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: str = "probabilities",
        sampler: Any = None,
        version: str | None = None,
        **options: Any,
    ) -> None:
        self.path = os.fspath(path)
        inspect.signature(PredictionMap).bind_partial(path, **options)  # a wrong name fails here, not in `predict`
        self._key, self._sampler, self._version = key, sampler, version
        self._options = options
        self._map: PredictionMap | None = None
        self._run: tuple[Any, Any, Any] | None = None  # From `setup` on: the model, its chips and its datamodule.
        self._full_sampler: Any = None
        self.paths: list[str] = []  #: Paths of the maps that were written.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replace the datamodule's sampler by the chips that are still to be predicted."""
        if stage != "predict":
            return
        data = trainer.datamodule
        full = getattr(data, "predict_sampler", None)
        sampler = self._sampler if full is None else full
        if sampler is None:
            raise UsageError(
                "MapWriter needs the chips: predict with a RasteretDataModule, or pass the loader's GridAOISampler as "
                "sampler=."
            )
        trainer.predict_loop.return_predictions = False  # they would fill the memory
        self.paths = []
        self._run = pl_module, sampler, data
        if full is not None:
            self._full_sampler, data.predict_sampler = full, _RemainingChips(self._open)

    def _open(self) -> PredictionMap:
        """Open the map when the loader is built: in `setup` the weights of `ckpt_path` are not loaded yet."""
        if self._map is None:
            assert self._run is not None
            module, sampler, data = self._run
            version = weights_digest(module) if self._version is None else self._version
            images = data_digest(getattr(data, "images", None))
            self._map = PredictionMap(self.path, sampler, version=version, data=images, **self._options)
        return self._map

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the map, if no datamodule has."""
        self._open()

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the batch to the map."""
        if dataloader_idx:
            raise UsageError("MapWriter supports one predict loader, got several.")
        if isinstance(outputs, Mapping):
            if self._key not in outputs:
                keys = sorted(map(str, outputs))
                raise UsageError(f"predict_step must return {self._key!r}, got {keys}; choose one with key=.")
            outputs = outputs[self._key]
        assert self._map is not None
        self._map.add(batch, outputs)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the map."""
        assert self._map is not None
        left = 0 if trainer.limit_predict_batches == 1.0 else self._map.count_missing()
        if left:
            _log.warning("%s is not written: limit_predict_batches skipped %d chips; run again", self.path, left)
            return
        self.paths = self._map.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save what was predicted."""
        self._close(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close files, and restore the datamodule's sampler."""
        if stage == "predict":
            self._close(trainer)

    def _close(self, trainer: Any) -> None:
        if self._map is not None:
            self._map.save()
            self._map.close()
        self._map = self._run = None
        if self._full_sampler is not None:
            trainer.datamodule.predict_sampler = self._full_sampler
            self._full_sampler = None


class _RemainingChips(DistributedSampler[AOI]):
    """The chips that a map still needs; the map is opened on first use. Lightning does not replace this class."""

    def __init__(self, open_map: Callable[[], PredictionMap]) -> None:
        self._open_map = open_map

    @functools.cached_property
    def _chips(self) -> SubsetSampler:
        return self._open_map().sampler

    def __len__(self) -> int:
        return len(self._chips)

    def __iter__(self) -> Iterator[AOI]:
        return iter(self._chips)

    def set_epoch(self, epoch: int) -> None:
        """Ignore epochs: predictions have none."""
