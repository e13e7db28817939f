"""Scenes for datasets: two overlapping dates with gaps, a neighbour, labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from affine import Affine

import rasteret_ml as rm
from rasteret_ml.testing import make_cog

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
