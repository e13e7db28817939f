"""Datasets, loaders and `load_bands` come through one `read_chips`, and agree pixel for pixel."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.raster import read, worker_loop
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.chip import Chip
from rasteret_ml.samplers.aoi.aoi import AOI, AOIDetails
from rasteret_ml.testing import make_cog

SIZE = 90
BANDS = ["B1", "B2"]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> rm.Collection:
    """One record of two bands, with nodata in it."""
    folder = tmp_path_factory.mktemp("one")
    pixels = np.random.default_rng(4).integers(0, 40, (2, SIZE, SIZE), np.uint16)
    place = Affine(10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)
    path = make_cog(folder / "a_20230801.tif", pixels, transform=place, nodata=0, blocksize=32, overviews="none")
    return rm.build(str(path), folder / "a.parquet")


def _load(collection: rm.Collection, shape: Any, crs: Any, **options: Any) -> Chip:
    """The chip of `load_bands`."""
    accessor = RasterAccessor(next(iter(collection.iterate_records())))
    (chip,) = asyncio.run(
        accessor.load_bands([shape], BANDS, output="tensor", geometry_crs=crs, progress=False, **options)
    )
    assert chip is not None
    return chip


def _sample(dataset: rm.RasteretDataset, shape: Any, chip: Chip) -> dict[str, Any]:
    """The dataset's sample of a polygon, on the pixels that its chip lies on."""
    xmin, ymin, xmax, ymax = chip.grid.bounds
    xres, yres = chip.grid.res
    details = AOIDetails(geometry=shape.wkb, crs=str(dataset.grid.crs))
    return dataset[AOI((slice(xmin, xmax, xres), slice(ymin, ymax, yres), dataset.bounds[2]), details)]


corners = st.integers(-150, SIZE * 10 + 150).map(float)


@examples(60)
@given(
    x=st.tuples(corners, corners, corners),
    y=st.tuples(corners, corners, corners),
    touched=st.booleans(),
    target=st.sampled_from([None, "EPSG:3035"]),
)
def test_a_sample_equals_load_bands(
    record: rm.Collection, x: tuple[float, ...], y: tuple[float, ...], touched: bool, target: str | None
) -> None:
    """Pixels, validity and AOI mask, on the native grid and on a reprojected one."""
    own = record.crs[0]
    triangle = shapely.Polygon([(500000 + a, 4999100 + b) for a, b in zip(x, y, strict=True)])
    frame = shapely.box(500000, 4999100, 500900, 5000000)
    if triangle.area < 200 or triangle.intersection(frame).area < 200:
        return
    dataset = rm.RasteretDataset(
        record, BANDS, crs=target, sample={"mask_aoi": True, "all_touched": touched, "valid_per_band": True}
    )
    chip = _load(record, triangle, own, all_touched=touched, target_crs=target)
    if target is None:
        shape = triangle
    else:
        from rasteret_ml.geo.crs import crs_text, transform_geometries

        moved = transform_geometries(np.array([triangle], dtype=object), crs_text(own), crs_text(target))
        shape = moved[0]
    sample = _sample(dataset, shape, chip)
    assert torch.equal(sample["image"], chip.data)
    assert torch.equal(sample["mask_valid"], chip.valid)
    assert torch.equal(sample["mask_aoi"][0], chip.inside)


def _count(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """Write a line per call of `read_chips`, in this process and in forked ones."""
    inner = read.read_chips

    async def counted(requests: Any, engine: Any, **options: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{len(requests)}\n")
        return await inner(requests, engine, **options)

    monkeypatch.setattr(worker_loop, "read_chips", counted)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_and_load_bands_share_one_read_chips(
    record: rm.Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """A batch is one call, of both sides of an `&`, and `load_bands` is one call of the same function."""
    log = tmp_path / "calls"
    _count(monkeypatch, log)
    images = rm.RasteretDataset(record, ["B1"])
    both = images & rm.RasteretDataset(record, ["B2"], sample={"key": "image_b"})
    sampler = rm.RandomAOISampler(both, 16, 12, seed=1)
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    assert len(list(rm.DataLoader(both, 4, sampler=sampler, **options))) == 3
    assert log.read_text().split() == ["8", "8", "8"]
    _load(record, shapely.box(500100, 4999500, 500300, 4999700), record.crs[0])
    assert log.read_text().split() == ["8", "8", "8", "1"]


def test_load_bands_uses_the_loop_of_its_process(record: rm.Collection) -> None:
    """Its reader, its tile cache and its request limit, where there is a loop; else an engine of its own."""
    loop = worker_loop.current_loop()
    before = loop.meter.snapshot().tiles_decoded
    _load(record, shapely.box(500100, 4999500, 500300, 4999700), record.crs[0])
    assert loop.meter.snapshot().tiles_decoded > before
    loop.close()
    chip = _load(record, shapely.box(500100, 4999500, 500300, 4999700), record.crs[0])
    assert chip.data.shape == (2, 20, 20)
