"""Hundreds of files of other projects: GDAL's pixels and georeferencing, or an error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from whole_file import header_of, read_band, read_bands

from rasteret_ml.cog.header.parse import CogHeader
from rasteret_ml.errors import DataError, NotATiffError

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """GDAL and tifffile warn about broken files."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _opened(folder: Path) -> Iterator[tuple[Path, bytes, Any]]:
    """Files of a folder that GDAL can open, with their bytes and dataset."""
    for path in sorted(folder.glob("*.tif*")):
        try:
            dataset = rasterio.open(path)
        except RasterioError:
            continue
        with dataset:
            yield path, path.read_bytes(), dataset


def _same_place(dataset: Any, header: CogHeader) -> bool:
    """Whether the corners of the image have the same position in our CRS and in GDAL's."""
    if header.crs is None or dataset.crs is None:
        return header.crs is None and dataset.crs is None
    try:
        ours, theirs = pyproj.CRS(header.crs), pyproj.CRS(dataset.crs.to_wkt())
    except pyproj.exceptions.CRSError:
        return True
    if ours.equals(theirs, ignore_axis_order=True):
        return True
    if ours.is_geographic != theirs.is_geographic or ours.is_projected != theirs.is_projected:
        return False
    corners = [dataset.transform @ c for c in ((0, 0), (dataset.width, 0), (dataset.width, dataset.height))]
    x, y = np.array(corners).T
    other = pyproj.Transformer.from_crs(theirs, ours, always_xy=True).transform(x, y)
    near = np.hypot(other[0] - x, other[1] - y) < (20 if ours.is_projected else 1e-3)
    return bool((near | ~np.isfinite(other[0])).all())


@pytest.mark.slow
def test_georeferencing_equals_gdal(shared_data: Path) -> None:
    """Transforms agree to 1e-9, CRSs by the positions of the corners (20 m allows for datum shifts, not units)."""
    wrong = {}
    for path, content, dataset in _opened(shared_data / "conformance"):
        try:
            header = header_of(content)
        except DataError:
            continue
        ours = header.transform or Affine.identity()
        if not np.allclose(ours[:6], dataset.transform[:6], rtol=1e-9, atol=1e-12):
            wrong[path.name] = f"transform {ours}, GDAL {dataset.transform}"
        if header.transform is None or dataset.transform == Affine.identity():
            continue  # GDAL moves the CRS of ground control points elsewhere
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not _same_place(dataset, header):
                wrong[path.name] = f"CRS {header.crs}, GDAL {dataset.crs}"
    assert wrong == {}


@pytest.mark.slow
def test_one_band_equals_the_same_band_of_all(shared_data: Path) -> None:
    """The metadata of a single band (planar ones sliced) reads that band."""
    compared = 0
    for _, content, dataset in _opened(shared_data / "conformance"):
        if dataset.count == 1 or dataset.count > 20:
            continue
        try:
            header = header_of(content)
            found = read_bands(content)
        except DataError:
            continue
        for index in {0, header.count - 1}:
            one = read_band(content, header, index).values[..., 0]
            assert np.array_equal(one, found.values[..., index], equal_nan=one.dtype.kind in "fc")
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", ["conformance", "malformed"])
def test_nothing_but_our_errors(shared_data: Path, name: str) -> None:
    """Every file gives pixels or a DataError with a message; PNG and JP2 are not TIFFs."""
    seen = 0
    for path in sorted((shared_data / name).iterdir()):
        if path.suffix == ".json":
            continue
        content, seen, raised = path.read_bytes(), seen + 1, None
        try:
            assert read_bands(content).values.size > 0, path.name
        except DataError as error:
            raised = error
        assert raised is None or str(raised), path.name
        assert path.suffix != ".jp2" or isinstance(raised, NotATiffError)
    assert seen >= 45


def test_malformed_files_that_are_read_equal_gdal(shared_data: Path) -> None:
    """If both GDAL and we read all of a broken file, the pixels are equal."""
    compared = 0
    for path, content, dataset in _opened(shared_data / "malformed"):
        try:
            found = read_bands(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                expected = np.moveaxis(dataset.read(), 0, -1)
        except (DataError, RasterioError):
            continue
        assert np.array_equal(found.values[found.stored], expected[found.stored]), path.name
        compared += 1
    assert compared >= 5
