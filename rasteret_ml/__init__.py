"""Train models straight from cloud-hosted satellite imagery.

    a row becomes a plan, a plan becomes ranges, ranges become bytes,
    bytes become tiles, tiles become a chip, chips become a batch

The map of the house, bottom step first; a file imports only from a lower step or its own room:

    0  errors       what can go wrong, whose fault it is, what to do
    1  ranges       byte ranges and merging them     telemetry    counters
       instants     times as people write them       plans        what makes two orders the same
    2  geo          windows, grids, CRSs, masks, warps, geometries in
    3  cog          TIFF without I/O: headers, tile tables, codecs   plotting     pictures
    4  record       one row, and the names of bands
    5  fetch        the only room with sockets: readers, retries, URL schemes, signing
    6  raster       a row becomes pixels: plan, execute, RasterAccessor, mosaic, explain
    7  runtime      one loop per process
    8  collection   the Parquet table
    9  ingest       makes Collections: files, tables, STAC
    10 aois         AOI tables, and what of them is covered
    11 sampling     which AOIs, in which order
    12 splitting    ground, AOIs and records into splits that do not leak
    13 scenes       records as places and times, and finding them
    14 samples      samples and batches: buffers, collate, composites, pictures
    15 reading      batches read ahead, drawn again, mended where data fail
    16 datasets     the torchgeo dataset, its `&` and `|`
    17 painting     polygons as labels
    18 loading      the loader, its states and what it measures
    19 maps         predictions of chips put together to COGs
    20 statistics   moments, percentiles, class counts      preparing    normalised, augmented, on the device
    21 train        Lightning datamodule, tasks, losses, watching, maps written
    22 cli          `rasteret-ml`                          testing      shipped fakes

Names below load on first use: importing the package loads neither torch nor aiohttp.
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
    "ErrorPolicy": "loader.error_policy",
    "ExactResume": "train.datamodule",
    "FetchLimits": "storage.limits",
    "GridAOISampler": "samplers.grid_sampler",
    "LoaderMonitor": "train.monitor",
    "Locality": "samplers.locality",
    "MapWriter": "train.map_writer",
    "MaskedLoss": "train.losses",
    "MaskedMetrics": "train.losses",
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
    "random_flip_rot90": "transforms.flips",
    "label_cells": "transforms.class_balance",
    "open_reader": "storage.open",
    "predict_map": "predict.predict",
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
