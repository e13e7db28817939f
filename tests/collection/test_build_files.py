"""Collections from GeoTIFF paths: what is found, how it is grouped, what it is called."""

from __future__ import annotations

import datetime as dt
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from pixel_oracle import assert_chip, rasters, run, window_by_rasterio
from rasterio.warp import transform_geom

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.build.read_source import records_from_files
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import DataError, RasteretError, UsageError
from rasteret_ml.testing import MemoryReader, RangeServer, RecordingReader, make_cog


def _cog(path: Path, value: int = 1, **options: Any) -> str:
    return make_cog(path, np.full((options.pop("count", 1), 16, 16), value, np.uint8), **options)


def _ids(collection: Collection) -> list[str]:
    return [record.id for record in rasters(collection)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with three rasters, one of them in a sub-folder, and a text file."""
    _cog(tmp_path / "in" / "b.tif", 2)
    _cog(tmp_path / "in" / "a.tif", 1)
    _cog(tmp_path / "in" / "deep" / "c.TIFF", 3)
    (tmp_path / "in" / "notes.md").write_text("not a raster")
    return tmp_path / "in"


def test_a_folder_is_all_tiffs_below(three: Path) -> None:
    """Endings match in any case; files are sorted; other files are ignored."""
    assert _ids(build(str(three), three / "c.parquet")) == ["a", "b", "c"]
    assert _ids(build(three, three / "c.parquet")) == ["a", "b", "c"]


def test_a_glob_is_what_it_matches(three: Path) -> None:
    """`*` in one folder, `**` below it."""
    assert _ids(build(f"{three}/*.tif", three / "c.parquet")) == ["a", "b"]
    assert _ids(build(f"{three}/**/*.[tT]*", three / "c.parquet")) == ["a", "b", "c"]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    """An existing file is not a pattern."""
    path = _cog(tmp_path / "scene[1].tif")
    assert _ids(build(path, tmp_path / "c.parquet")) == ["scene[1]"]


def test_a_list_keeps_its_order_and_drops_repeats(three: Path) -> None:
    """Paths, `Path`s and globs mixed; a file named twice is one record."""
    source = [str(three / "b.tif"), three / "a.tif", f"{three}/*.tif"]
    assert _ids(build(source, three / "c.parquet")) == ["b", "a"]


def test_a_text_file_is_a_list(three: Path, server: RangeServer) -> None:
    """A path or URL a line; blank lines and comments do not count."""
    listing = three / "list.txt"
    listing.write_text(f"# scenes\n\n{three}/b.tif\n  {server.url}/in/deep/c.TIFF  \n{three}/a*.tif\n")
    collection = build(str(listing), three / "c.parquet")
    assert _ids(collection) == ["b", "c", "a"]
    assert rasters(collection)[1].assets["B1"]["href"] == f"{server.url}/in/deep/c.TIFF"


def test_urls_are_kept_as_they_are(three: Path, server: RangeServer) -> None:
    """And are read over HTTP, with the right pixels."""
    collection = build([f"{server.url}/in/a.tif", f"{server.url}/in/b.tif"], three / "c.parquet")
    for record in rasters(collection):
        chip = run(record.read_window((-4, 0, 20, 16), ["B1"]))
        assert_chip(chip, *window_by_rasterio(three / f"{record.id}.tif", (-4, 0, 20, 16)))


def test_file_urls_are_local_files(three: Path) -> None:
    """`file://` with a space in it."""
    path = Path(_cog(three / "with space.tif"))
    assert _ids(build(path.as_uri(), three / "c.parquet")) == ["with space"]


@pytest.mark.parametrize("name", ["*.tif", "empty", "list.txt"])
def test_a_source_without_files_is_an_error(tmp_path: Path, name: str) -> None:
    """A glob that matches nothing, an empty folder, an empty list."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match=r"no files found"):
        build(str(tmp_path / name), tmp_path / "c.parquet")
    assert not (tmp_path / "c.parquet").exists()


@pytest.mark.parametrize("source", [[], (), set()])
def test_nothing_to_build_from(tmp_path: Path, source: Any) -> None:
    """An empty list."""
    with pytest.raises(UsageError, match="nothing to build from"):
        build(source, tmp_path / "c.parquet")


@pytest.mark.parametrize("source", [3, [3.5], [None], {"a": 1}, [{"type": "Feature"}]])
def test_an_unknown_type_of_source_is_named(tmp_path: Path, source: Any) -> None:
    """A number, None, a mapping that is not STAC."""
    with pytest.raises(UsageError, match=r"int|float|NoneType|dict"):
        build(source, tmp_path / "c.parquet")


def test_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    """The message lists the schemes that work."""
    with pytest.raises(UsageError, match=r"'ftp'.*https"):
        build("ftp://host/a.tif", tmp_path / "c.parquet")


def test_a_malformed_url_is_named(three: Path) -> None:
    """In the report, like any unreadable file, or in the error."""
    try:
        collection = build([str(three / "a.tif"), "http://[broken/b.tif"], three / "c.parquet")
    except UsageError as error:
        message = str(error)
    else:
        message = str(collection.report)
    assert "broken" in message


def test_paths_are_kept_absolute(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Collection built from relative paths can be read from any folder (Hydra changes the working directory)."""
    monkeypatch.chdir(three)
    build(["a.tif", "deep/*.TIFF"], "c.parquet")
    monkeypatch.chdir("/")
    for record in rasters(Collection.open(three / "c.parquet")):
        assert run(record.read_window((0, 0, 2, 2), ["B1"])).data.shape == (1, 2, 2)


# One multi-band file a record --------------------------------------------------------------------------


def test_bands_are_named_in_order(tmp_path: Path) -> None:
    """`bands=` names the bands of each file, and reading them returns those bands."""
    data = np.stack([np.full((16, 16), i, np.uint8) for i in (1, 2, 3)])
    path = make_cog(tmp_path / "rgb.tif", data)
    collection = build(path, tmp_path / "c.parquet", bands=["red", "green", "blue"])
    assert collection.bands == ["red", "green", "blue"]
    (record,) = rasters(collection)
    chip = run(record.read_window((0, 0, 2, 2), ["blue", "red"]))
    assert np.asarray(chip.data)[:, 0, 0].tolist() == [3, 1]
    assert [record.assets[b]["band_index"] for b in ("red", "green", "blue")] == [0, 1, 2]


def test_bands_have_their_own_names_or_numbers(tmp_path: Path) -> None:
    """The file's descriptions if all are set and distinct, else B1, B2, …"""
    described = _cog(tmp_path / "d.tif", count=2, descriptions=("nir", "red"))
    alike = _cog(tmp_path / "e.tif", count=2, descriptions=("x", "x"))
    assert build(described, tmp_path / "c.parquet").bands == ["nir", "red"]
    assert build(alike, tmp_path / "c.parquet").bands == ["B1", "B2"]


def test_a_single_band_has_no_index(tmp_path: Path) -> None:
    """Null, as rasteret writes it."""
    (record,) = rasters(build(_cog(tmp_path / "a.tif"), tmp_path / "c.parquet"))
    assert record.assets["B1"]["band_index"] is None


def test_a_wrong_count_of_names_is_reported(tmp_path: Path) -> None:
    """Three names for two bands: the failure has both numbers, and the other file is built."""
    good, bad = _cog(tmp_path / "good.tif", count=3), _cog(tmp_path / "bad.tif", count=2)
    collection = build([good, bad], tmp_path / "c.parquet", bands=["r", "g", "b"])
    assert _ids(collection) == ["good"]
    (failure,) = collection.report.failures  # type: ignore[attr-defined]
    assert "bad.tif: the file has 2 bands, but got 3 names" in str(failure)
    with pytest.raises(DataError, match=r"bad\.tif: the file has 2 bands"):
        build([good, bad], tmp_path / "c.parquet", bands=["r", "g", "b"], strict=True)


def test_a_text_for_bands_is_refused(tmp_path: Path) -> None:
    """It would be iterated letter by letter."""
    with pytest.raises(UsageError, match="'B04'"):
        build(_cog(tmp_path / "a.tif"), tmp_path / "c.parquet", bands="B04")


def test_a_mapping_of_bands_is_not_ignored_for_files(tmp_path: Path) -> None:
    """`bands=` as a mapping is for tables: for files it is an error, or its values are used."""
    data = np.stack([np.full((16, 16), i, np.uint8) for i in (1, 2)])
    path = make_cog(tmp_path / "two.tif", data)
    try:
        collection = build(path, tmp_path / "c.parquet", bands={"second": 1, "first": 0})
    except UsageError:
        return
    (record,) = rasters(collection)
    assert int(run(record.read_window((0, 0, 1, 1), ["second"])).data[0, 0, 0]) == 2


# One file per band, grouped ----------------------------------------------------------------------------


def test_files_that_differ_in_the_band_are_one_record(tmp_path: Path) -> None:
    """Band as prefix, suffix or whole name; the id is the rest of the name, and the date is read from it."""
    names = [
        "T33TWL_20230810_B04.tif", "T33TWL_20230810_B08.tif", "T33TWL_20230813_B08.tif", "T33TWL_20230813_B04.tif",
        "B04_2023-08-15_tile.tif", "B08_2023-08-15_tile.tif", "sub/B04.tif", "sub/B08.tif",
    ]  # fmt: skip
    files = [_cog(tmp_path / name, i + 1) for i, name in enumerate(names)]
    collection = build(files, tmp_path / "c.parquet", bands=["B04", "B08"])
    records = {record.id: record for record in rasters(collection)}
    assert list(records) == ["T33TWL_20230810", "T33TWL_20230813", "2023-08-15_tile", "sub"]
    assert all(record.available_bands == ["B04", "B08"] for record in records.values())
    assert records["T33TWL_20230813"].datetime == dt.datetime(2023, 8, 13)
    assert records["2023-08-15_tile"].datetime == dt.datetime(2023, 8, 15)
    assert records["sub"].datetime is None
    chip = run(records["T33TWL_20230813"].read_window((0, 0, 1, 1), ["B04", "B08"]))
    assert np.asarray(chip.data).ravel().tolist() == [4, 3]


def test_a_file_that_breaks_the_grouping_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One file without a band in its name among files of one band each."""
    for name in ("s_B02", "s_B03", "land_cover"):
        make_cog(tmp_path / f"{name}.tif", np.ones((8, 8), np.uint8))
    with caplog.at_level(logging.WARNING), pytest.raises(RasteretError):
        build(str(tmp_path), tmp_path / "c.parquet", bands=["B02", "B03"])
    assert "1 of 3" in caplog.text
    assert "land_cover.tif" in caplog.text


def test_a_band_is_a_word_in_the_name(tmp_path: Path) -> None:
    """B8 matches neither B8A nor XB8; case does not matter."""
    files = [_cog(tmp_path / name) for name in ("s_b8.tif", "s_B8A.tif")]
    (record,) = rasters(build(files, tmp_path / "c.parquet", bands=["B8", "B8A"]))
    assert record.id == "s"
    assert record.assets["B8"]["href"].endswith("s_b8.tif")
    assert record.assets["B8A"]["href"].endswith("s_B8A.tif")
    (record,) = records_from_files(["/data/XB8.tif"], ["B8"], None)
    assert (record.id, list(record.assets)) == ("XB8", ["*"])


def test_the_longest_band_wins(tmp_path: Path) -> None:
    """`s_red_edge` is the band `red_edge` of s, not the band `red` of s_edge."""
    records = records_from_files(["/data/s_red_edge.tif", "/data/s_red.tif"], ["red", "red_edge"], None)
    assert [(record.id, sorted(record.assets)) for record in records] == [("s", ["red", "red_edge"])]


def test_a_record_may_lack_a_band(tmp_path: Path) -> None:
    """It is null in that record, not an error."""
    files = [_cog(tmp_path / name) for name in ("s1_B04.tif", "s1_B08.tif", "s2_B04.tif")]
    collection = build(files, tmp_path / "c.parquet", bands=["B04", "B08"])
    assert [record.available_bands for record in rasters(collection)] == [["B04", "B08"], ["B04"]]


def test_two_files_for_one_band_are_refused(tmp_path: Path) -> None:
    """The message names both."""
    files = [_cog(tmp_path / name) for name in ("s_B04.tif", "s_b04.tif")]
    with pytest.raises(UsageError, match=r"(?s)band B04.*s_B04\.tif.*s_b04\.tif"):
        build(files, tmp_path / "c.parquet", bands=["B04"])


def test_ids_are_unique(tmp_path: Path) -> None:
    """Same names in two folders: the folder is prepended."""
    files = [_cog(tmp_path / folder / "scene.tif") for folder in ("x", "y")]
    assert _ids(build(files, tmp_path / "c.parquet")) == ["x/scene", "y/scene"]
    grouped = [_cog(tmp_path / folder / f"s_{band}.tif") for folder in ("x", "y") for band in ("B1", "B2")]
    assert _ids(build(grouped, tmp_path / "c.parquet", bands=["B1", "B2"])) == ["x/s", "y/s"]


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("sen2_20210527_aber_tile0", dt.datetime(2021, 5, 27)),
        ("m_4709963_se_14_1_20100629", dt.datetime(2010, 6, 29)),
        ("2021-05-27", dt.datetime(2021, 5, 27)),
        ("2021_05_27", dt.datetime(2021, 5, 27)),
        ("S2A_MSIL2A_20230815T095031_N0509", dt.datetime(2023, 8, 15)),
        ("tile_20211340", None),
        ("id_120210527", None),
        ("2021-0527", None),
        ("20230230_x_20230301", dt.datetime(2023, 3, 1)),
        ("nothing", None),
    ],
)
def test_dates_in_names(name: str, date: dt.datetime | None) -> None:
    """YYYYMMDD with or without the same separator twice; impossible days are not dates."""
    (record,) = records_from_files([f"/data/{name}.tif"], None, "filename")
    assert record.datetime == date
    (undated,) = records_from_files([f"/data/{name}.tif"], None, None)
    assert undated.datetime is None


def test_datetime_accepts_two_values(tmp_path: Path) -> None:
    """Anything else is an error."""
    with pytest.raises(UsageError, match="'today'"):
        build(_cog(tmp_path / "a.tif"), tmp_path / "c.parquet", datetime="today")


# Fields of a record -----------------------------------------------------------------------------------


def test_the_footprint_is_the_rasters_outline(tmp_path: Path) -> None:
    """In longitude/latitude, with its box."""
    path = _cog(tmp_path / "a.tif")
    (record,) = rasters(build(path, tmp_path / "c.parquet"))
    with rasterio.open(path) as source:
        outline = transform_geom(source.crs, "EPSG:4326", shapely.geometry.mapping(shapely.box(*source.bounds)))
    expected = shapely.geometry.shape(outline)
    found = shapely.from_wkb(record.footprint)
    assert found.symmetric_difference(expected).area < 1e-3 * expected.area
    assert record.bbox == pytest.approx(found.bounds)


def test_a_file_without_crs_has_no_footprint(tmp_path: Path) -> None:
    """It is still a record, and windows can be read."""
    path = _cog(tmp_path / "a.tif", crs=None)
    collection = build(path, tmp_path / "c.parquet")
    (record,) = rasters(collection)
    assert record.crs is None
    assert record.bbox is None
    assert record.footprint is None
    assert collection.crs == []
    assert int(run(record.read_window((0, 0, 1, 1), ["B1"])).data[0, 0, 0]) == 1


def test_bands_of_one_record_share_a_crs(tmp_path: Path) -> None:
    """The second band is a failure that names both CRSs."""
    files = [_cog(tmp_path / "s_B1.tif"), _cog(tmp_path / "s_B2.tif", crs="EPSG:32634")]
    collection = build(files, tmp_path / "c.parquet", bands=["B1", "B2"])
    (record,) = rasters(collection)
    assert record.available_bands == ["B1"]
    assert "EPSG:32634" in str(collection.report)
    assert "EPSG:32633" in str(collection.report)


def test_several_crs_make_one_collection(shared_data: Path, tmp_path: Path) -> None:
    """On both sides of a UTM boundary: both CRSs are kept, and pixels are right."""
    files = sorted((shared_data / "utm_pair").glob("*.tif"))
    collection = build([str(f) for f in files], tmp_path / "c.parquet")
    assert collection.crs == ["EPSG:26917", "EPSG:26918"]
    for path, record in zip(files, rasters(collection), strict=True):
        chip = run(record.read_window((10, 10, 50, 50), record.available_bands))
        assert_chip(chip, *window_by_rasterio(path, (10, 10, 50, 50)))


def test_a_header_is_read_once_per_file(tmp_path: Path) -> None:
    """Four bands of one href: one request."""
    path = _cog(tmp_path / "a.tif", count=4)
    reader = RecordingReader(MemoryReader({path: Path(path).read_bytes()}))
    collection = build([path, path], tmp_path / "c.parquet", backend=reader)
    assert len(collection.bands) == 4
    assert len(reader.calls) == 1


def test_the_landcover_folder(shared_data: Path, tmp_path: Path) -> None:
    """16 dated images of ten named bands."""
    images = build(str(shared_data / "landcover" / "images"), tmp_path / "i.parquet", strict=True)
    assert len(images) == 16
    assert images.bands == [f"Band {i + 1}" for i in range(10)]
    assert images.crs == ["EPSG:27700"]
    assert {record.datetime for record in rasters(images)} == {dt.datetime(2021, 5, 27)}
    assert images.report.requests == 16  # type: ignore[attr-defined]
