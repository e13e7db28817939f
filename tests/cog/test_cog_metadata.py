"""Tile tables and band metadata as structs of a Collection."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from affine import Affine
from whole_file import header_of, read_image

from rasteret_ml.cog.metadata import CogMetadata, transform_from_list, transform_to_list
from rasteret_ml.cog.tile_table import TileTable, slice_plane
from rasteret_ml.errors import CollectionError
from rasteret_ml.testing import make_cog


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


OLD = {
    "image_width": 100, "image_height": 50, "tile_width": 64, "tile_height": 64, "dtype": "uint16",
    "transform": [10.0, 500000.0, -10.0, 5000000.0], "predictor": 2, "compression": 8,
    "tile_offsets": [1000, 2000], "tile_byte_counts": [10, 20], "pixel_scale": [10.0, 10.0, 0.0],
    "tiepoint": [0.0, 0.0, 0.0, 500000.0, 5000000.0, 0.0],
}  # fmt: skip
"""What rasteret 0.3 wrote."""


def test_a_struct_brings_everything_back(tmp_path) -> None:
    """Written through Arrow and read back: the same struct, and the same pixels of image, overview and mask."""
    rng = np.random.default_rng(0)
    path = make_cog(
        tmp_path / "a.tif", rng.integers(0, 99, (2, 300, 280)).astype(np.int16), blocksize=128, nodata=-7,
        mask=rng.random((300, 280)) > 0.5, compress="zstd",
    )  # fmt: skip
    content = Path(path).read_bytes()
    before = header_of(content).band(1, file_size=len(content), etag='"abc"')
    row = pa.array([_plain(before.to_struct())]).to_pylist()[0]
    after = CogMetadata.from_struct(row, crs=before.crs)
    assert _plain(after.to_struct()) == _plain(before.to_struct())
    assert (after.crs, after.grid) == (before.crs, before.grid)
    for a, b in zip(
        (after.image, after.mask, *after.overviews), (before.image, before.mask, *before.overviews), strict=True
    ):
        assert np.array_equal(read_image(content, a).values, read_image(content, b).values)


def test_metadata_pickles() -> None:
    """Rows are pickled to reach workers."""
    before = CogMetadata.from_struct(OLD, crs="EPSG:32633")
    after = pickle.loads(pickle.dumps(before))
    assert _plain(after.to_struct()) == _plain(before.to_struct())


def test_reads_what_rasteret_wrote() -> None:
    """Only the fields of rasteret 0.3: defaults for the rest, and the georeferencing."""
    found = CogMetadata.from_struct(OLD, crs="EPSG:32633")
    assert (found.width, found.height, found.tile_width, found.tile_height) == (100, 50, 64, 64)
    assert (found.dtype, found.compression, found.predictor) == (np.uint16, 8, 2)
    assert (found.samples_per_pixel, found.planar_configuration, found.mask, found.overviews) == (1, 1, None, ())
    assert found.transform == Affine(10, 0, 500000, 0, -10, 5000000)
    assert found.grid.shape == (50, 100)
    assert (found.nodata, found.scale, found.file_size) == (None, None, None)


@pytest.mark.parametrize("missing", ["tile_offsets", "tile_byte_counts", "dtype", "image_width", "tile_height"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_what_is_missing_is_named(missing: str, how: str) -> None:
    """The message names the missing field and the remedy."""
    struct = dict(OLD)
    if how == "null":
        struct[missing] = None
    else:
        del struct[missing]
    with pytest.raises(CollectionError, match=rf"{missing}.*rebuild"):
        CogMetadata.from_struct(struct, crs=None)


@pytest.mark.parametrize("offsets", [[1], [1, 2, 3]])
def test_tables_of_the_wrong_length_are_refused(offsets: list[int]) -> None:
    """Two tiles need two offsets and two counts."""
    with pytest.raises(CollectionError, match="tile offsets"):
        CogMetadata.from_struct(OLD | {"tile_offsets": offsets, "tile_byte_counts": offsets}, crs=None)
    with pytest.raises(CollectionError, match="counts"):
        CogMetadata.from_struct(OLD | {"tile_byte_counts": offsets}, crs=None)


def test_a_planar_table_stored_whole_is_sliced() -> None:
    """Band 1 of 3 gets the second third of the offsets."""
    whole = OLD | {
        "samples_per_pixel": 3, "planar_configuration": 2, "tile_offsets": [1, 2, 3, 4, 5, 6],
        "tile_byte_counts": [10, 20, 30, 40, 50, 60],
    }  # fmt: skip
    found = CogMetadata.from_struct(whole, crs=None, band_index=1)
    assert found.tile_offsets.tolist() == [3, 4]
    assert found.tile_byte_counts.tolist() == [30, 40]
    table = slice_plane(TileTable.from_struct(whole), 2)
    assert table.tile_offsets.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("struct", "dtype", "nodata"),
    [
        ({"nodata": 0.0}, "uint8", 0),
        ({"nodata": float(2**63), "nodata_int": 2**63 - 1}, "int64", 2**63 - 1),
        ({"nodata": -9999.0}, "float32", -9999.0),
        ({"nodata": 2.5}, "uint8", 2.5),
        ({}, "uint8", None),
    ],
)
def test_nodata_of_a_struct(struct: dict[str, Any], dtype: str, nodata: float | None) -> None:
    """An integer for integer pixels, exact where a float could not hold it."""
    found = CogMetadata.from_struct(OLD | struct | {"dtype": dtype}, crs=None).nodata
    assert found == nodata
    assert type(found) is type(nodata)


@pytest.mark.parametrize("nodata", [2**63 - 1, -(2**63), 2**53 + 1, 0])
def test_integer_nodata_survives_exactly(nodata: int) -> None:
    """64-bit values are restored exactly."""
    before = CogMetadata.from_struct(OLD | {"dtype": "int64", "nodata": 0.0, "nodata_int": nodata}, crs=None)
    assert CogMetadata.from_struct(before.to_struct(), crs=None).nodata == nodata


@pytest.mark.parametrize(
    "transform",
    [
        None,
        Affine(10, 0, 5, 0, -10, 7),
        Affine(10, 0, 5, 0, 10, 7),
        Affine(1, 2, 3, 4, 5, 6),
        Affine(0, -10, 1, 10, 0, 2),
    ],
)
def test_transforms_come_back(transform: Affine | None) -> None:
    """North-up as four numbers (as rasteret), rotated as six, None as None."""
    values = transform_to_list(transform)
    assert transform_from_list(values) == transform
    if transform is not None and transform.b == 0:
        assert values == [transform.a, transform.c, transform.e, transform.f]


def test_a_transform_of_another_length_is_refused() -> None:
    """Five numbers are refused; nine are an affine with its last row."""
    with pytest.raises(CollectionError, match="5"):
        transform_from_list([1, 2, 3, 4, 5])
    assert transform_from_list([1, 2, 3, 4, 5, 6, 0, 0, 1]) == Affine(1, 2, 3, 4, 5, 6)


def test_big_endian_dtype_names_are_read_as_native() -> None:
    """Older writers named the stored byte order; pixels here are native."""
    assert CogMetadata.from_struct(OLD | {"dtype": ">u2"}, crs=None).dtype == np.dtype("=u2")
