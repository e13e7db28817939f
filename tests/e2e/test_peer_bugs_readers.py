"""Bugs of other readers (`reference/readers.md`, sections 1.1 and 1.2: async-tiff, lazycogs), a test for each."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
import tifffile
from peer_files import TILED, X, Y, assert_equals_rasterio, dataset_of, entry_of, gtiff, noise, photo, slices
from pixel_oracle import assert_chip, build_one, cause_of, rasters, run, window_by_rasterio

import rasteret_ml as rm
from rasteret_ml.errors import (
    CorruptTiffError,
    ReadError,
)
from rasteret_ml.testing import MemoryReader, RecordingReader, make_cog

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def _recorder(path: str) -> RecordingReader:
    return RecordingReader(MemoryReader({path: Path(path).read_bytes()}))


# 1.1 async-geotiff and async-tiff ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "predictor"), [("uint8", 2), ("uint16", 2), ("int32", 2), ("float32", 3)])
def test_the_predictor_of_separate_planes(tmp_path: Path, dtype: str, predictor: int) -> None:
    """async-tiff: with separate planes the predictor ran over all bands together; 99.3 % of the pixels were wrong."""
    data, options = noise(dtype, (4, 70, 90)), {"compress": "deflate", "predictor": predictor, "interleave": "band"}
    assert_equals_rasterio(gtiff(tmp_path / "a.tif", data, **options, **TILED), tmp_path)
    assert_equals_rasterio(gtiff(tmp_path / "b.tif", data, blockysize=16, **options), tmp_path)


def test_sparse_tiles_of_a_mostly_empty_raster(tmp_path: Path) -> None:
    """async-tiff: `Invalid range requested, start: 0 end: 0` on a tile that is not stored."""
    data = np.zeros((1, 320, 320), np.uint8)
    data[0, 100:200, 100:200] = noise("uint8", (100, 100))
    path = make_cog(tmp_path / "s.tif", data, sparse_ok=True, blocksize=64, nodata=0)
    record = assert_equals_rasterio(path, tmp_path)
    assert (record.source("B1").metadata.tile_byte_counts == 0).mean() > 0.5
    reader = _recorder(path)
    chip = run(record.read_window((0, 0, 64, 64), ["B1"], backend=reader))
    assert reader.calls == []
    assert not chip.valid.any()


def test_nan_nodata_masks_nan(tmp_path: Path) -> None:
    """async-geotiff, lazycogs: `data == nodata` masks nothing where nodata is NaN (0 % of 19.5 %)."""
    data = noise("float32", (1, 64, 64))
    holes = noise("uint8", (1, 64, 64)) < 50
    data[holes] = np.nan
    path = make_cog(tmp_path / "a.tif", data, nodata=float("nan"))
    assert_equals_rasterio(path, tmp_path)
    sample = dataset_of(path, tmp_path)[slices(0, 0, 64, 64)]
    np.testing.assert_array_equal(sample["mask_valid"].numpy(), ~holes)


@pytest.mark.parametrize(
    "window", [(-20, -30, 50, 60), (50, 70, 40, 40), (-5, -5, 100, 120), (30, 85, 1, 10), (200, 0, 5, 5), (0, -9, 5, 9)]
)
def test_windows_past_the_edge(tmp_path: Path, window: tuple[int, int, int, int]) -> None:
    """async-geotiff: `WindowError`; here such a chip has its full size, and its outside is nodata and invalid."""
    path = make_cog(tmp_path / "a.tif", noise("uint16", (2, 70, 90)), nodata=3, blocksize=128)
    chip = run(build_one(path, tmp_path).read_window(window, ["B2", "B1"]))
    assert_chip(chip, *window_by_rasterio(path, window, [2, 1]))


def test_a_chip_past_the_edge_through_a_warp(tmp_path: Path) -> None:
    """rio-tiler: boundless reads through a WarpedVRT failed; here the chip's size is what was asked for."""
    dataset = dataset_of(make_cog(tmp_path / "a.tif", np.full((1, 64, 64), 9, np.uint8)), tmp_path, crs=3035, res=10)
    x, y, _ = dataset.bounds
    sample = dataset[x.start - 300 : x.start + 340, y.stop - 340 : y.stop + 300]
    valid = sample["mask_valid"][0].numpy()
    assert sample["image"].shape == (1, 64, 64)
    assert not valid[:28].any()
    assert not valid[:, :28].any()
    assert valid[45:, 45:].all()
    assert set(sample["image"][0].numpy()[valid].tolist()) == {9}


def test_a_band_of_separate_planes_fetches_its_own_plane(tmp_path: Path) -> None:
    """async-geotiff: no band subset, so one band of a planar file cost all of them."""
    path = gtiff(tmp_path / "a.tif", noise("uint16", (5, 128, 128)), interleave="band", compress="deflate", **TILED)
    record = build_one(path, tmp_path)
    for band in ("B1", "B4"):
        reader = _recorder(path)
        chip = run(record.read_window((0, 0, 128, 128), [band], backend=reader))
        assert_chip(chip, *window_by_rasterio(path, (0, 0, 128, 128), [int(band[1:])]))
        counts = record.source(band).metadata.tile_byte_counts
        assert len(counts) == 16
        wanted = int(counts.sum())
        assert sum(span.length for _, span in reader.calls) <= 1.02 * wanted
        assert Path(path).stat().st_size > 4.5 * wanted


def test_a_window_costs_little_more_than_its_tiles(tmp_path: Path) -> None:
    """async-geotiff: gaps of up to 1 MiB were read through, 2.8 times the bytes of the window's 25 tiles."""
    path = make_cog(tmp_path / "a.tif", noise("uint16", (1, 1024, 1024)), blocksize=128, overviews="none")
    record, reader = build_one(path, tmp_path), _recorder(path)
    chip = run(record.read_window((128, 128, 384, 384), ["B1"], backend=reader))
    assert_chip(chip, *window_by_rasterio(path, (128, 128, 384, 384)))
    counts = record.source("B1").metadata.tile_byte_counts.reshape(8, 8)[1:4, 1:4]
    assert sum(span.length for _, span in reader.calls) <= 1.26 * counts.sum()
    assert len(reader.calls) <= 3


def test_mask_and_image_come_together(tmp_path: Path) -> None:
    """async-geotiff: image and mask tiles, interleaved in a COG, were two merged reads over the same bytes (4.1x)."""
    mask = noise("uint8", (512, 512)) > 40
    path = make_cog(tmp_path / "a.tif", noise("uint8", (3, 512, 512)), mask=mask, blocksize=128, overviews="none")
    record, reader = build_one(path, tmp_path), _recorder(path)
    bands = ["B1", "B2", "B3"]
    chip = run(record.read_window((0, 0, 256, 512), bands, backend=reader))
    assert_chip(chip, *window_by_rasterio(path, (0, 0, 256, 512)))
    ((_, span),) = reader.calls
    metadata = record.source("B1").metadata
    wanted = sum(int(table.tile_byte_counts[:8].sum()) for table in (metadata.image, metadata.mask))
    assert span.length <= wanted + 16 * 8  # with leader and trailer of each tile


def test_no_byte_comes_twice(tmp_path: Path) -> None:
    """async-geotiff: see above; over far apart windows, bands and overlaps in one batch."""
    mask = noise("uint8", (512, 512)) > 40
    path = make_cog(tmp_path / "a.tif", noise("uint8", (3, 512, 512)), mask=mask, blocksize=64)
    record, reader = build_one(path, tmp_path), _recorder(path)
    boxes = [
        shapely.box(X + 10 * c, Y - 10 * r - 900, X + 10 * c + 900, Y - 10 * r)
        for r, c in ((0, 0), (30, 40), (400, 300))
    ]
    chips = run(record.load_bands(boxes, ["B1", "B3"], geometry_crs=32633, output="tensor", backend=reader))
    for (row, col), chip in zip(((0, 0), (30, 40), (400, 300)), chips, strict=True):
        assert_chip(chip, *window_by_rasterio(path, (row, col, 90, 90), [1, 3]))
    spans = sorted(span for _, span in reader.calls)
    assert all(one.stop <= other.start for one, other in pairwise(spans))


_STREAMS = ["lzw", "deflate", "zstd", "packbits", "lzma"]


@pytest.mark.parametrize("compress", _STREAMS)
def test_a_corrupt_stream_is_an_error(tmp_path: Path, compress: str) -> None:
    """async-tiff: bad LZW was a panic of the process; here it is an error that names the tile."""
    path = gtiff(tmp_path / "a.tif", noise("uint8", (1, 64, 64)), compress=compress, blockysize=64)
    record = build_one(path, tmp_path)
    metadata = record.source("B1").metadata
    start, count = int(metadata.tile_offsets[0]), int(metadata.tile_byte_counts[0])
    content = bytearray(Path(path).read_bytes())
    content[start : start + count] = (b"\x80" if compress == "packbits" else b"\xff") * count
    with pytest.raises(ReadError, match=r"record a, band B1, .*tile 0, bytes") as caught:
        run(record.read_window((0, 0, 64, 64), ["B1"], backend=MemoryReader({path: bytes(content)})))
    assert isinstance(cause_of(caught.value), CorruptTiffError)


@pytest.mark.parametrize("compress", _STREAMS)
def test_a_stream_that_ends_early_is_an_error(tmp_path: Path, compress: str) -> None:
    """imagecodecs: a short LZW stream decodes to a short tile without a word; never blank pixels."""
    path = gtiff(tmp_path / "a.tif", noise("uint8", (1, 64, 64)) // 64, compress=compress, blockysize=64)
    content = bytearray(Path(path).read_bytes())
    place = entry_of(bytes(content), 279) + 8
    (count,) = struct.unpack_from("<I", content, place)
    assert count == build_one(path, tmp_path).source("B1").metadata.tile_byte_counts[0]
    struct.pack_into("<I", content, place, count // 2)
    Path(path).write_bytes(content)
    with pytest.raises(ReadError, match="CorruptTiffError"):
        run(build_one(path, tmp_path).read_window((0, 0, 64, 64), ["B1"]))


@pytest.mark.parametrize(
    ("tag", "at", "value"),
    [(305, 2, 99), (305, 2, 0), (282, 2, 3), (282, 2, 2), (34735, None, 7)],
    ids=["type 99", "type 0", "XResolution SHORT", "XResolution ASCII", "GeoKeyDirectory version 7"],
)
def test_odd_fields_are_passed_over(tmp_path: Path, tag: int, at: int | None, value: int) -> None:
    """async-tiff: an unknown field type, XResolution that is no fraction, and another key version were panics."""
    path, data = tmp_path / "a.tif", noise("uint16", (64, 64))
    geokeys = (34735, "H", 12, (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633), True)
    tifffile.imwrite(
        path, data, tile=(32, 32), compression="deflate", software="somebody's program", metadata=None,
        resolution=(72, 72), extratags=[geokeys],
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    place = entry_of(bytes(content), tag)
    place = struct.unpack_from("<I", content, place + 8)[0] if at is None else place + at
    struct.pack_into("<H", content, place, value)
    path.write_bytes(content)
    chip = run(build_one(path, tmp_path).read_window((0, 0, 64, 64), ["B1"]))
    assert_chip(chip, data[None], np.ones((1, 64, 64), bool))


def test_a_directory_at_the_end_costs_the_header_only(tmp_path: Path) -> None:
    """async-tiff: a header cache that grows from byte 0 downloads the whole of a file whose IFD lies at its end."""
    path = gtiff(tmp_path / "a.tif", noise("uint16", (1, 1024, 1024)), **TILED)
    with rasterio.open(path, "r+") as target:
        target.update_tags(NOTE="x" * 3000)
    content = Path(path).read_bytes()
    assert struct.unpack_from("<I", content, 4)[0] > len(content) * 0.9
    reader = _recorder(path)
    (record,) = rasters(rm.build(path, tmp_path / "c.parquet", backend=reader))
    assert sum(span.length for _, span in reader.calls) < 100_000 < len(content) / 20
    assert_chip(run(record.read_window((990, 900, 40, 40), ["B1"])), *window_by_rasterio(path, (990, 900, 40, 40)))


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("opaque", [True, False])
def test_webp_keeps_its_alpha(tmp_path: Path, lossless: bool, opaque: bool) -> None:
    """async-tiff, tifffile: an RGBA tile that is opaque everywhere is stored, and came back, without its alpha."""
    data = photo(4)
    data[3] = np.where(data[3] > 100, 255, 0)
    data[3, :32, :32] = 255
    data[3] = 255 if opaque else data[3]
    options: dict[str, Any] = {"photometric": "RGB", "alpha": "non-premultiplied", "interleave": "pixel"}
    path = gtiff(tmp_path / "a.tif", data, compress="webp", webp_lossless=lossless, **options, **TILED)
    record = assert_equals_rasterio(path, tmp_path)
    chip = run(record.read_window((0, 0, 70, 90), ["B4", "B1"]))
    np.testing.assert_array_equal(chip.data[0], data[3])
    np.testing.assert_array_equal(chip.valid[1], data[3] == 255)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("uint8", {"nbits": 1}), ("uint8", {"nbits": 5}), ("uint16", {"nbits": 12}), ("uint16", {"compress": "lzma"}),
        ("uint8", {"compress": "packbits"}), ("float32", {"compress": "lerc_zstd"}),
    ],
    ids=str,
)  # fmt: skip
def test_rarer_samples_and_codecs(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    """async-tiff: no PackBits, no packed integers."""
    data = noise(dtype, (2, 70, 90))
    data = data >> (8 * data.itemsize - options["nbits"]) if "nbits" in options else data
    assert_equals_rasterio(gtiff(tmp_path / "a.tif", data, **options, **TILED), tmp_path)


@pytest.mark.parametrize("predictor", [1, 3])
def test_16_bit_floats(tmp_path: Path, predictor: int) -> None:
    """async-tiff: no float16. It stays one here, where older GDALs give float32."""
    data = noise("float32", (2, 70, 90)).astype(np.float16).astype(np.float32)
    path = gtiff(tmp_path / "a.tif", data, nbits=16, compress="deflate", predictor=predictor, **TILED)
    chip = run(build_one(path, tmp_path).read_window((0, 0, 70, 90), ["B1", "B2"]))
    assert_chip(chip, data.astype(np.float16), np.ones(data.shape, bool))


def test_masks_of_overviews_belong_to_their_own_level(tmp_path: Path) -> None:
    """async-geotiff pairs masks with images by size alone; each level here has its own, as in GDAL."""
    mask = np.zeros((256, 200), bool)
    mask[:, :101] = True
    path = make_cog(tmp_path / "a.tif", noise("uint8", (1, 256, 200)), mask=mask, blocksize=64)
    record = assert_equals_rasterio(path, tmp_path)
    for level in range(1, len(record.source("B1").metadata.levels)):
        with rasterio.open(path, overview_level=level - 1) as source:
            data, valid = source.read(), source.read_masks() != 0
        assert_chip(run(record.read_window((0, 0, *data.shape[1:]), ["B1"], level=level)), data, valid)


# 1.2 lazycogs -----------------------------------------------------------------------------------------------


def test_a_pixel_needs_all_its_bands(tmp_path: Path) -> None:
    """lazycogs: masked only where all bands are nodata, and never by an internal mask."""
    data = np.full((2, 32, 32), 5, np.uint8)
    data[0, :8], data[1, :16] = 0, 0
    dataset = dataset_of(make_cog(tmp_path / "n.tif", data, nodata=0), tmp_path, sample={"valid_per_band": True})
    np.testing.assert_array_equal(dataset[slices(0, 0, 32, 32)]["mask_valid"].numpy(), data != 0)
    dataset = dataset_of(tmp_path / "n.tif", tmp_path)
    np.testing.assert_array_equal(dataset[slices(0, 0, 32, 32)]["mask_valid"].numpy(), (data != 0).all(0)[None])
    mask = noise("uint8", (32, 32)) > 99
    dataset = dataset_of(make_cog(tmp_path / "m.tif", data, mask=mask), tmp_path)
    np.testing.assert_array_equal(dataset[slices(0, 0, 32, 32)]["mask_valid"].numpy()[0], mask)
