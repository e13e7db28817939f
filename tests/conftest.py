"""Fixtures for every room: real data where it lies beside the checkout, a loopback server, small scenes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import settings

import rasteret_ml as rm
from rasteret_ml.testing import RangeServer, make_cog

settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Processes of the start method `forkserver` are forked from one that has imported this.
multiprocessing.set_forkserver_preload(
    ["rasteret_ml.datasets.raster_dataset", "rasteret_ml.loader.loader", "lightning.pytorch", "hydra"]
)

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of tile tables go to a folder of the test run, in child processes as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RASTERET_ML_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rasters; the test is skipped, with its reason, where it is absent."""
    if not _SHARED.is_dir():
        pytest.skip(f"no real data at {_SHARED}")
    return _SHARED


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded randomness."""
    return np.random.default_rng(0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """A range server over `tmp_path`."""
    with RangeServer(tmp_path) as running:
        yield running


BANDS = ("B02", "B03")


@dataclass(frozen=True)
class Scenes:
    """Where the files are, and what is in them."""

    folder: Path
    images: rm.Collection
    labels: rm.Collection
    old: np.ndarray
    new: np.ndarray
    east: np.ndarray
    cover: np.ndarray


def corner(col: int, row: int) -> Affine:
    """10 m grid with pixel (col, row) as its corner."""
    return Affine(10.0, 0.0, 500000.0 + 10 * col, 0.0, -10.0, 5000000.0 - 10 * row)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """`old` and `new` cover the same 300 x 300 pixels on two dates, `new` with a hole; `east` lies beside them."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(5)
    old, new, east = (rng.integers(1, 5000, (2, 300, 300), np.uint16) for _ in range(3))
    new[:, 100:200, 50:150] = 0
    for name, pixels, col in (("S_20230801", old, 0), ("S_20230811", new, 0), ("E_20230805", east, 300)):
        for band, channel in zip(BANDS, pixels, strict=True):
            make_cog(folder / f"{name}_{band}.tif", channel, transform=corner(col, 0), nodata=0, blocksize=128)
    cover = rng.integers(0, 5, (300, 601), np.uint8)
    make_cog(folder / "cover.tif", cover, transform=corner(-1, 0), nodata=0, blocksize=128)
    images = rm.build(str(folder / "*_B0*.tif"), folder / "images.parquet", bands=BANDS)
    labels = rm.build(str(folder / "cover.tif"), folder / "labels.parquet", datetime=None)
    return Scenes(folder, images, labels, old, new, east, cover)
