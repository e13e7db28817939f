"""What rasterio says, and short ways to ask the library the same: helpers for the tests of several rooms."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import rasterio
from rasterio.windows import Window as RioWindow

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import RasteretError
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.chip import Chip
from rasteret_ml.storage.reader import FetchLimits, RetryPolicy, Timeouts

_T = TypeVar("_T")

PATIENT = Timeouts(connect=600, read=600, total=600)
"""Fails when a server says so, never because the machine stood still for a while."""
QUICK = FetchLimits(timeouts=PATIENT, retry=RetryPolicy(attempts=2, base=0.0, cap=0.05))
"""Gives up soon when a server refuses."""
HASTY = replace(QUICK, timeouts=replace(PATIENT, read=0.5))
"""For a server that never answers."""


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end on a loop of its own."""
    return asyncio.run(work)


def rasters(collection: Collection) -> list[RasterAccessor]:
    """All records of a Collection."""

    async def gather() -> list[RasterAccessor]:
        return [raster async for raster in collection.iterate_rasters()]

    return run(gather())


def build_one(path: str | Path, folder: Path, **options: Any) -> RasterAccessor:
    """The record of a Collection over one file."""
    (only,) = rasters(build(str(path), folder / "one.parquet", **options))
    return only


def window_by_rasterio(
    path: str | Path, window: tuple[int, int, int, int], indexes: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and validity `[C, h, w]` of (row, column, height, width); outside the image: nodata or 0, invalid."""
    row, col, height, width = window
    with rasterio.open(path) as source:
        chosen = list(indexes or source.indexes)
        fill = 0 if source.nodata is None else source.nodata
        data = np.full((len(chosen), height, width), fill, source.dtypes[0])
        valid = np.zeros(data.shape, bool)
        top, left = max(row, 0), max(col, 0)
        bottom, right = min(row + height, source.height), min(col + width, source.width)
        if top < bottom and left < right:
            part = RioWindow(left, top, right - left, bottom - top)
            place = (slice(None), slice(top - row, bottom - row), slice(left - col, right - col))
            data[place] = source.read(chosen, window=part)
            valid[place] = source.read_masks(chosen, window=part) != 0
    return data, valid


def assert_chip(chip: Chip, data: np.ndarray, valid: np.ndarray) -> None:
    """The chip holds exactly these pixels, in this dtype, with this validity."""
    got = np.asarray(chip.data)
    assert got.dtype == data.dtype
    np.testing.assert_array_equal(got, data)
    np.testing.assert_array_equal(np.asarray(chip.valid), valid)


def cause_of(error: BaseException) -> RasteretError:
    """The library's error behind a ReadError."""
    assert isinstance(error.__cause__, RasteretError), error.__cause__
    return error.__cause__
