"""Train models straight from cloud-hosted satellite imagery.

The packages, in import order; a file imports only from its own package or from one listed before it:

    errors        what can go wrong, and what to do about it
    telemetry     counters                                  ranges        byte ranges and merging them
    fingerprint   what saved states are checked against
    geo           grids, windows, CRSs, times, geometries, resampling; no I/O
    cog           TIFF headers, tile tables and codecs; no I/O
    plotting      pictures
    storage       where bytes come from: HTTP, local files, signing; the only package with sockets
    raster        a record becomes pixels: plan, read, assemble; `RasterAccessor`; one event loop per process
    collection    the Parquet table of records; `build` makes it from files, tables and STAC items
    samplers      which chips, in which order; AOI tables and splits
    samples       chips to samples, samples to batches
    datasets      the TorchGeo datasets, their index, their `&` and `|`
    loader        the DataLoader: prefetching, error recovery, resuming, statistics
    transforms    normalize, augment, move to the device; statistics of channels and classes
    predict       chips of predictions blended to maps
    train         Lightning: datamodule, tasks, losses, callbacks
    cli           `rasteret-ml`                             testing       servers, files and checks for tests

How a batch flows through a `DataLoader` worker:

    loader        PrefetchingDataset.__getitems__        takes the batch, and starts those that follow
    datasets      RasteretDataset.requests               finds the records of each query
    raster        ChipRequest.plan                       plans the tiles of each chip
    cog           plan_tiles                             looks up their byte ranges
    raster        WorkerLoop.read, read_chips, execute   one call for the batch, on the process's event loop
    storage       SchemeReader.read                      fetches byte ranges
    cog           decode_tile                            decompresses a tile
    raster        copy_tile, finish_chip, Mosaic         copies, validity, resampling, overlapping records
    datasets      RasteretDataset.samples                chips to samples
    samples       make_samples                           fills the tensors
    loader        TimedCollate                           calls the collate function
    samples       collate                                stacks the batch

No package calls the one that called it: what a step needs is in the requests (grids, rules, and records, a sequence
that reads rows of the Parquet table when they are needed). `RasterAccessor.load_bands` enters at `ChipRequest.plan` and
leaves with the chips. Names below load on first use: importing the package loads neither torch nor aiohttp.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "AOITable": "samplers.aoi.aoi_table",
    "Augmentation": "transforms.augment",
    "ClassificationTask": "train.task",
    "Collection": "collection.collection",
    "DataLoader": "loader.loader",
    "PerAOISampler": "samplers.per_aoi",
    "ErrorPolicy": "loader.failures",
    "ExactResume": "train.datamodule",
    "FetchLimits": "storage.reader",
    "GridAOISampler": "samplers.grid_sampler",
    "LoaderMonitor": "train.monitor",
    "Locality": "samplers.locality",
    "MapWriter": "train.map_writer",
    "MaskedLoss": "train.task",
    "MaskedMetrics": "train.task",
    "PixelwiseRegressionTask": "train.task",
    "PolygonDataset": "datasets.polygons",
    "QualityMask": "raster.quality",
    "RandomAOISampler": "samplers.random",
    "RasterAccessor": "raster.accessor",
    "RasteretDataModule": "train.datamodule",
    "RasteretDataset": "datasets.raster_dataset",
    "RegressionTask": "train.task",
    "SegmentationTask": "train.task",
    "TimeSeries": "datasets.index.dates",
    "balanced_weights": "transforms.class_balance",
    "build": "collection.build.build",
    "check_splits": "samplers.splits.leaks",
    "collate": "samples.collate",
    "dataset_statistics": "transforms.statistics",
    "device_batches": "transforms.device",
    "random_flip_rot90": "transforms.augment",
    "label_cells": "transforms.class_balance",
    "open_reader": "storage.open",
    "predict_map": "predict.prediction_map",
    "normalize": "transforms.normalize",
    "spatial_split": "samplers.aoi.target_grids",
    "split_aois": "samplers.splits.blocks",
    "split_blocks": "samplers.splits.blocks",
    "split_records": "samplers.splits.records",
}

__all__ = sorted(_WHERE)
__version__ = "0.5.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
