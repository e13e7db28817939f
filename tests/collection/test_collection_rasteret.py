"""A Collection as rasteret 0.3/0.4 writes it, made by hand, opens and reads the right pixels."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
import tifffile
from affine import Affine
from pixel_oracle import assert_chip, rasters, run, window_by_rasterio
from rasterio.warp import transform_geom

from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import CollectionError, UnknownBandError
from rasteret_ml.testing import make_cog

_STRUCT = [
    ("image_width", pa.int32()), ("image_height", pa.int32()), ("tile_width", pa.int32()),
    ("tile_height", pa.int32()), ("dtype", pa.string()), ("transform", pa.list_(pa.float64())),
    ("predictor", pa.int32()), ("compression", pa.int32()), ("tile_offsets", pa.list_(pa.int64())),
    ("tile_byte_counts", pa.list_(pa.int64())), ("pixel_scale", pa.list_(pa.float64())),
    ("tiepoint", pa.list_(pa.float64())), ("nodata", pa.float64()), ("samples_per_pixel", pa.int32()),
    ("planar_configuration", pa.int32()), ("photometric", pa.int32()), ("extra_samples", pa.list_(pa.int32())),
]  # fmt: skip
_LAST_FIVE = {name for name, _ in _STRUCT[-5:]}


def _band_struct(path: str, plane: int | None = None) -> dict[str, Any]:
    """A band's struct from tifffile and rasterio."""
    with tifffile.TiffFile(path) as tiff, rasterio.open(path) as source:
        page, t = tiff.pages[0], source.transform
        offsets, counts = list(page.dataoffsets), list(page.databytecounts)
        if plane is not None:
            per_plane = len(offsets) // source.count
            own = slice(plane * per_plane, (plane + 1) * per_plane)
            offsets, counts = offsets[own], counts[own]
        return {
            "image_width": source.width,
            "image_height": source.height,
            "tile_width": page.tilewidth,
            "tile_height": page.tilelength,
            "dtype": source.dtypes[0],
            "transform": [t.a, t.c, t.e, t.f],
            "predictor": int(page.predictor),
            "compression": int(page.compression),
            "tile_offsets": offsets,
            "tile_byte_counts": counts,
            "pixel_scale": [t.a, -t.e, 0.0],
            "tiepoint": [0.0, 0.0, 0.0, t.c, t.f, 0.0],
            "nodata": source.nodata,
            "samples_per_pixel": source.count,
            "planar_configuration": int(page.planarconfig),
            "photometric": int(page.photometric),
            "extra_samples": [int(v) for v in page.extrasamples],
        }


def _write(root: Path, rows: list[dict[str, Any]], bands: list[str], struct: list[tuple[str, pa.DataType]]) -> None:
    """Write rows to `year=/month=` files with exactly rasteret's columns, order and schema metadata."""
    asset = pa.struct([("href", pa.string()), ("band_index", pa.int64())])
    box = pa.struct([(c, pa.float64()) for c in ("xmin", "ymin", "xmax", "ymax")])
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}}
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("datetime", pa.timestamp("us")),
            ("geometry", pa.binary()),
            ("assets", pa.struct([(band, asset) for band in bands])),
            ("collection", pa.string()),
            ("eo:cloud_cover", pa.float64()),
            ("proj:epsg", pa.int32()),
            ("crs", pa.string()),
            *[(f"{band}_metadata", pa.struct(struct)) for band in bands],
            ("bbox", box),
        ],
        metadata={
            b"name": b"by-hand", b"data_source": b"", b"description": b"", b"created": b"2026-04-01T00:00:00",
            b"date_range": b"", b"rasteret_collection_version": b"1", b"geo": json.dumps(geo).encode(),
        },
    )  # fmt: skip
    for row in rows:
        when = row["datetime"]
        parts = ("__HIVE_DEFAULT_PARTITION__",) * 2 if when is None else (when.year, when.month)
        folder = root / f"year={parts[0]}" / f"month={parts[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row], schema=schema), folder / "part-0.parquet", compression="zstd")


def _row(name: str, when: dt.datetime | None, bands: dict[str, tuple[str, int | None, dict[str, Any]]]) -> Any:
    (path, _, _) = next(iter(bands.values()))
    with rasterio.open(path) as source:
        crs = source.crs
        outline = shapely.geometry.mapping(shapely.box(*source.bounds))
    outline = shapely.geometry.shape(transform_geom(crs, "EPSG:4326", outline))
    xmin, ymin, xmax, ymax = outline.bounds
    return {
        "id": name,
        "datetime": when,
        "geometry": shapely.to_wkb(outline),
        "assets": {band: {"href": href, "band_index": index} for band, (href, index, _) in bands.items()},
        "collection": "sentinel-2-l2a",
        "eo:cloud_cover": 12.5,
        "proj:epsg": crs.to_epsg(),
        "crs": f"EPSG:{crs.to_epsg()}",
        **{f"{band}_metadata": struct for band, (_, _, struct) in bands.items()},
        "bbox": {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax},
    }


def _pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60000, (count, 150, 170), dtype=np.uint16)


def _planar(path: Path) -> str:
    profile = {
        "driver": "GTiff", "count": 3, "height": 150, "width": 170, "dtype": "uint16", "crs": "EPSG:32633",
        "transform": Affine(10, 0, 500000, 0, -10, 5000000), "tiled": True, "blockxsize": 64, "blockysize": 64,
        "interleave": "band", "compress": "lzw", "predictor": 2, "nodata": 3,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(_pixels(3, 3))
    return str(path)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collection, dict[str, tuple[str, dict[str, int]]]]:
    """Three rows in three partitions; each lacks some bands, which are null children."""
    folder = tmp_path_factory.mktemp("byhand")
    two = make_cog(folder / "b02.tif", _pixels(1, 0), blocksize=64)
    three = make_cog(folder / "b03.tif", _pixels(1, 1), blocksize=64, compress="zstd", nodata=0)
    chunky = make_cog(folder / "chunky.tif", _pixels(3, 2), blocksize=64, crs="EPSG:32634")
    planar = _planar(folder / "planar.tif")
    separate = {"B02": (two, None, _band_struct(two)), "B03": (three, None, _band_struct(three))}
    rows = [
        _row("separate", dt.datetime(2024, 1, 5, 10, 20, 30), separate),
        _row("chunky", dt.datetime(2023, 12, 31), {f"B0{i + 2}": (chunky, i, _band_struct(chunky)) for i in range(3)}),
        _row("planar", None, {f"B0{i + 2}": (planar, i, _band_struct(planar, i)) for i in range(3)}),
    ]
    _write(folder / "hand_stac", rows, ["B02", "B03", "B04"], _STRUCT)
    truth = {
        "separate": {"B02": (two, 1), "B03": (three, 1)},
        "chunky": {f"B0{i + 2}": (chunky, i + 1) for i in range(3)},
        "planar": {f"B0{i + 2}": (planar, i + 1) for i in range(3)},
    }
    return Collection.open(folder / "hand_stac"), truth  # type: ignore[return-value]


def test_it_opens(by_hand: Any) -> None:
    """Rows of all partitions, the undated one included; bands, CRSs, dates, clouds."""
    collection, truth = by_hand
    assert len(collection) == 3
    assert collection.bands == ["B02", "B03", "B04"]
    assert collection.crs == ["EPSG:32633", "EPSG:32634"]
    assert collection.data_source == "sentinel-2-l2a"
    records = {record.id: record for record in rasters(collection)}
    assert records["separate"].datetime == dt.datetime(2024, 1, 5, 10, 20, 30)
    assert records["planar"].datetime is None
    assert records["chunky"].crs == 32634
    assert records["chunky"].cloud_cover == 12.5
    for name, record in records.items():
        assert record.available_bands == sorted(truth[name])


def test_every_band_of_every_layout_reads_rasterios_pixels(by_hand: Any) -> None:
    """Single-band, pixel-interleaved and band-interleaved files; windows inside and over the edge; several bands."""
    collection, truth = by_hand
    for record in rasters(collection):
        for band, (path, index) in truth[record.id].items():
            for window in ((-10, -10, 180, 200), (60, 63, 10, 70)):
                chip = run(record.read_window(window, [band]))
                assert_chip(chip, *window_by_rasterio(path, window, [index]))
        bands = list(truth[record.id])
        if record.id != "separate":
            chip = run(record.read_window((100, 100, 80, 80), bands))
            assert_chip(chip, *window_by_rasterio(truth[record.id][bands[0]][0], (100, 100, 80, 80)))


def test_it_reads_by_geometry_and_by_registry_name(by_hand: Any) -> None:
    """The 4-value transform puts a footprint where the file is; `blue` finds B02."""
    collection, truth = by_hand
    (record,) = rasters(collection.where(pc.field("id") == "chunky"))
    with rasterio.open(truth["chunky"]["B02"][0]) as source:
        assert record.grid("blue").transform == source.transform
        assert record.grid("blue").crs == "EPSG:32634"
    (chip,) = run(
        record.load_bands(
            [shapely.box(500200, 4999000, 500500, 4999600)], ["blue"], geometry_crs=32634, output="tensor"
        )
    )
    assert_chip(chip, *window_by_rasterio(truth["chunky"]["B02"][0], (40, 20, 60, 30), [1]))


def test_a_null_child_is_a_missing_band(by_hand: Any) -> None:
    """`separate` has no B04: three Nones, and an error that lists its bands."""
    collection, _ = by_hand
    (record,) = rasters(collection.where(pc.field("id") == "separate"))
    assert record.try_get_band_cog_metadata("B04") == (None, None, None)
    with pytest.raises(UnknownBandError, match=r"separate has no band 'B04'; it has: B02, B03"):
        record.source("B04")


def test_filters_work_on_it(by_hand: Any) -> None:
    """On partition columns and others."""
    collection, _ = by_hand
    assert len(collection.where(pc.field("year") == 2024)) == 1
    assert len(collection.subset(cloud_cover_lt=20)) == 3
    assert [r.id for r in rasters(collection.subset(date_range="2023-12-01/2023-12-31"))] == ["chunky"]
    zone_34 = collection.subset(bbox=(20.9, 44, 21.2, 46))
    assert [r.id for r in rasters(zone_34)] == ["chunky"]


def test_it_can_be_written_again(by_hand: Any, tmp_path: Path) -> None:
    """By our writer, in both layouts, without loss."""
    collection, truth = by_hand
    for name in ("again.parquet", "again"):
        again = collection.write(tmp_path / name)
        assert sorted(r.id for r in rasters(again)) == sorted(truth)
        (record,) = rasters(again.where(pc.field("id") == "planar"))
        chip = run(record.read_window((0, 0, 150, 170), ["B04"]))
        assert_chip(chip, *window_by_rasterio(truth["planar"]["B04"][0], (0, 0, 150, 170), [3]))


def _one(folder: Path, path: str, struct: dict[str, Any], fields: Any = None, index: int | None = None) -> Any:
    """The record of a one-row Collection with this struct."""
    fields = [(name, kind) for name, kind in fields or _STRUCT if name in struct]
    row = _row("one", dt.datetime(2024, 5, 1), {"B02": (path, index, struct)})
    _write(folder / "one_records", [row], ["B02"], fields)
    (record,) = rasters(Collection.open(folder / "one_records"))
    return record


def test_older_files_without_the_last_five_children(tmp_path: Path) -> None:
    """nodata, samples, planes, photometric and extra samples have defaults."""
    path = make_cog(tmp_path / "a.tif", _pixels(1, 4), blocksize=64)
    struct = {k: v for k, v in _band_struct(path).items() if k not in _LAST_FIVE}
    assert len(struct) == 12
    record = _one(tmp_path, path, struct)
    assert_chip(run(record.read_window((-5, -5, 160, 180), ["B02"])), *window_by_rasterio(path, (-5, -5, 160, 180)))


def test_older_files_with_null_children(tmp_path: Path) -> None:
    """The children exist and are null."""
    path = make_cog(tmp_path / "a.tif", _pixels(1, 4), blocksize=64)
    record = _one(tmp_path, path, _band_struct(path) | dict.fromkeys(_LAST_FIVE | {"pixel_scale", "tiepoint"}))
    assert_chip(run(record.read_window((0, 0, 150, 170), ["B02"])), *window_by_rasterio(path, (0, 0, 150, 170)))


def test_width_and_height_by_their_older_names(tmp_path: Path) -> None:
    """`width`/`height` for `image_width`/`image_height`."""
    path = make_cog(tmp_path / "a.tif", _pixels(1, 4), blocksize=64)
    struct = _band_struct(path)
    struct |= {"width": struct.pop("image_width"), "height": struct.pop("image_height")}
    fields = [("width", pa.int32()), ("height", pa.int32()), *_STRUCT[2:]]
    record = _one(tmp_path, path, struct, fields)
    assert_chip(run(record.read_window((0, 0, 150, 170), ["B02"])), *window_by_rasterio(path, (0, 0, 150, 170)))


def test_transforms_of_six_values(tmp_path: Path) -> None:
    """Affine a, b, c, d, e, f."""
    t = Affine(20, 0, 600000, 0, -20, 5100000)
    path = make_cog(tmp_path / "a.tif", _pixels(1, 4), blocksize=64, transform=t)
    record = _one(tmp_path, path, _band_struct(path) | {"transform": list(t)[:6]})
    assert record.grid("B02").transform == t


def test_south_up_transforms(tmp_path: Path) -> None:
    """scale_y > 0: the first row is the southernmost, and a geometry finds its pixels."""
    t = Affine(10, 0, 500000, 0, 10, 4998500)
    path = make_cog(tmp_path / "a.tif", _pixels(1, 4), blocksize=64, transform=t)
    with rasterio.open(path) as source:
        assert source.transform == t
    record = _one(tmp_path, path, _band_struct(path))
    (chip,) = run(
        record.load_bands([shapely.box(500100, 4998700, 500300, 4998800)], ["B02"], geometry_crs=32633, output="tensor")
    )
    assert_chip(chip, *window_by_rasterio(path, (20, 10, 10, 20)))
    assert bool(chip.inside.all())


def test_a_planar_table_stored_whole(tmp_path: Path) -> None:
    """tiles x samples offsets are sliced by band_index."""
    path = _planar(tmp_path / "p.tif")
    record = _one(tmp_path, path, _band_struct(path), index=1)
    assert_chip(run(record.read_window((0, 0, 150, 170), ["B02"])), *window_by_rasterio(path, (0, 0, 150, 170), [2]))


def test_sparse_tiles_by_zero_offsets(tmp_path: Path) -> None:
    """Offset 0, count 0: nodata or 0 without a request."""
    data = np.zeros((1, 128, 128), np.uint16)
    data[0, :64] = 5
    path = make_cog(tmp_path / "s.tif", data, blocksize=64, sparse_ok=True, overviews="none")
    struct = _band_struct(path)
    assert struct["tile_byte_counts"][2:] == [0, 0]
    record = _one(tmp_path, path, struct)
    assert_chip(run(record.read_window((0, 0, 128, 128), ["B02"])), *window_by_rasterio(path, (0, 0, 128, 128)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_offsets": None}, "tile_offsets"),
        ({"dtype": None}, "dtype"),
        ({"tile_width": None}, "tile_width"),
        ({"tile_offsets": [1, 2, 3]}, r"3 tile offsets but 9 counts"),
        ({"tile_offsets": [1, 2], "tile_byte_counts": [1, 2]}, r"2 tile offsets for 9 tiles"),
        ({"transform": [1.0, 2.0, 3.0]}, "4 or 6 values"),
    ],
)
def test_an_inconsistent_struct_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Before any byte is read."""
    path = make_cog(tmp_path / "a.tif", _pixels(1, 4), blocksize=64)
    record = _one(tmp_path, path, _band_struct(path) | change)
    with pytest.raises(CollectionError, match=message):
        run(record.read_window((0, 0, 8, 8), ["B02"]))
