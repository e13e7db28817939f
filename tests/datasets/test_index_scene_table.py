"""What a dataset knows of its records: arrays against record-by-record reading, extents against the plain formula."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely
from affine import Affine
from hypothesis import assume, given
from hypothesis import strategies as st
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection
from rasteret_ml.datasets.index.scene_index import (
    cut_to_footprints,
    follows_the_edge,
    grid_outlines,
    pack_index,
    scene_index,
    tile_layout,
)
from rasteret_ml.datasets.index.scene_table import RecordStore, choose_grid, scene_table
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import LONLAT, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.testing import make_cog

UTM = "EPSG:32633"
GRIDS = {
    "plain": Affine(10, 0, 500000, 0, -10, 5000000),
    "south up": Affine(10, 0, 500000, 0, 10, 4990000),
    "mirrored": Affine(-10, 0, 520000, 0, -10, 5000000),
    "rotated": Affine.translation(500000, 5000000) * Affine.rotation(30) * Affine.scale(10, -10),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Four kinds of grid in one zone, one in the next; tiles of 16, rasters of 40 x 50."""
    folder = tmp_path_factory.mktemp("mixed")
    pixels = np.ones((1, 40, 50), np.uint8)
    for i, transform in enumerate([*GRIDS.values(), GRIDS["plain"]]):
        crs = UTM if i < len(GRIDS) else "EPSG:32634"
        make_cog(
            folder / f"{i}_2024010{i + 1}.tif", pixels, transform=transform, crs=crs, blocksize=16, overviews="none"
        )
    return rm.build(str(folder / "*.tif"), folder / "c.parquet")


def test_facts_are_those_of_the_records(mixed: Collection) -> None:
    """Row by row, of the whole and of a view."""
    for view in (mixed, mixed.where(pc.field("proj:epsg") == 32633), mixed.where(pc.field("id") > "2")):
        facts, store = scene_table(view, ["B1"]), RecordStore(view, ["B1"])
        records = [RasterAccessor(info) for info in view.iterate_records()]
        assert len(facts) == len(records) == len(view)
        for i, record in enumerate(records):
            assert facts.grid(i) == record.grid("B1")
            assert facts.id_of(i) == record.id == store[i].id
            assert facts.times[i] == np.datetime64(record.datetime, "ns")
            assert facts.tiles[i].tolist() == [16, 16]
        assert np.argsort(facts.id_ranks).tolist() == np.argsort([r.id for r in records]).tolist()
        assert [r.id for r in store.records(facts.rows)] == [r.id for r in records]
        assert [r.id for r in store.records(facts.rows)[1:]] == [r.id for r in records[1:]]


def test_facts_travel_light_and_whole(mixed: Collection) -> None:
    """A pickle has every array, bit for bit."""
    facts = scene_table(mixed, ["B1"])
    copy = pickle.loads(pickle.dumps(facts))
    for name in ("rows", "crs_codes", "transforms", "shapes", "tiles", "times", "id_ranks"):
        assert getattr(copy, name).tobytes() == getattr(facts, name).tobytes()
        assert getattr(copy, name).dtype == getattr(facts, name).dtype
    assert (copy.crs_texts, copy.dtype, copy.has_scale) == (facts.crs_texts, facts.dtype, facts.has_scale)
    assert choose_grid(copy, UTM, None) == choose_grid(facts, UTM, None)


def test_records_are_read_only_when_looked_at(mixed: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip on two hundred dates reads the records that it needs."""
    store, read = RecordStore(mixed, ["B1"]), []
    inner = store._rows.__class__.__getitem__
    monkeypatch.setattr(store._rows.__class__, "__getitem__", lambda self, row: read.append(row) or inner(self, row))
    records = store.records(np.array([3, 1, 4]))
    assert len(records) == 3
    assert read == []
    assert records[1].info.row == 1
    assert read == [1]
    assert store[1] is records[1]


@pytest.mark.parametrize("kind", GRIDS)
def test_outlines_are_the_grids_own(kind: str) -> None:
    """Exact corners, also of rotated grids."""
    grid = Grid(crs=UTM, transform=GRIDS[kind], shape=(40, 50))
    (found,) = grid_outlines(np.array([tuple(grid.transform)[:6]]), np.array([grid.shape], np.int32))
    assert found.equals(grid.footprint)
    assert found.bounds == grid.bounds


def _lonlat(grid: Grid, corners: Any) -> shapely.Polygon:
    """A polygon of pixel positions, its points alone put into longitude/latitude."""
    points = np.array([grid.transform @ tuple(corner) for corner in corners])
    shape = np.array([shapely.Polygon(points)], dtype=object)
    (moved,) = shapely.transform(shape, lambda xy: shapely.get_coordinates(
        transform_geometries(shapely.points(xy), str(grid.crs), LONLAT)
    ))  # fmt: skip
    return moved


W, H = 11000, 11000
CORNERS = [(0, 0), (W, 0), (W, H), (0, H)]


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    ("points", "follows"),
    [
        (CORNERS, True),
        (CORNERS[::-1], True),
        ([(0.6, -0.7), (W + 0.8, 0.1), (W, H - 0.9), (-0.5, H)], True),
        ([(0, 0), (W / 3, 0), (W, 0), (W, H / 2), (W, H), (0, H)], True),
        ([(2, 0), (W, 0), (W, H), (0, H)], False),
        ([(0, 0), (W, 0), (W, H)], False),
        ([(0, 0), (W, 0), (W, H), (W / 2, H / 2), (0, H)], False),
        ([(0, 0), (W / 2, H), (W, 0), (W, H), (0, H)], False),
        ([(0, 0), (W, 0), (W, H), (W / 2, H + 5), (0, H)], False),
        ([(-W, -H), (2 * W, -H), (2 * W, 2 * H), (-W, 2 * H)], False),
    ],
)
def test_a_footprint_of_the_rasters_corners_is_the_raster(kind: str, points: Any, follows: bool) -> None:
    """Though its straight lines in longitude/latitude bend away from the raster's edges by many pixels."""
    grid = Grid(crs=UTM, transform=GRIDS[kind], shape=(H, W))
    shape = np.array([_lonlat(grid, points)], dtype=object)
    transforms, shapes = np.array([tuple(grid.transform)[:6]]), np.array([grid.shape], np.int32)
    assert follows_the_edge(shape, transforms, shapes, UTM).tolist() == [follows]


def test_only_plain_polygons_follow_an_edge() -> None:
    """Holes, parts, nothing: these are looked at as areas."""
    grid = Grid(crs=UTM, transform=GRIDS["plain"], shape=(H, W))
    whole = _lonlat(grid, CORNERS)
    hole = whole.difference(_lonlat(grid, [(5, 5), (50, 5), (50, 50)]))
    shapes = [hole, shapely.MultiPolygon([whole]), shapely.Polygon(), None, whole.exterior, whole]
    count = len(shapes)
    transforms = np.tile(tuple(grid.transform)[:6], (count, 1))
    found = follows_the_edge(np.array(shapes, dtype=object), transforms, np.tile(grid.shape, (count, 1)), UTM)
    assert found.tolist() == [False] * 5 + [True]


@examples(100)
@given(
    st.lists(st.tuples(st.floats(-0.3, 1.3), st.floats(-0.3, 1.3)), min_size=3, max_size=7, unique=True),
    st.integers(20, 3000),
)
def test_a_cut_is_the_intersection_but_for_a_quarter_pixel(points: Any, size: int) -> None:
    """Against the plain formula: whole within a pixel of the footprint or where they miss, else what both have."""
    grid = Grid(crs=UTM, transform=GRIDS["plain"], shape=(size, size))
    shape = np.array([_lonlat(grid, np.array(points) * size)], dtype=object)
    assume(shapely.MultiPoint(points).convex_hull.area > 1e-4)
    extent = np.array([grid.footprint], dtype=object)
    prints = shapely.make_valid(transform_geometries(shape, LONLAT, UTM))
    (expected,) = shapely.intersection(extent, prints)
    if shapely.covers(shapely.buffer(prints[0], 10), extent[0]) or expected.area == 0:
        expected = extent[0]
    (found,) = cut_to_footprints(extent.copy(), shape, UTM, 10.0)
    assert found.symmetric_difference(expected).area <= 2.6 * max(expected.length, 40)
    assert shapely.covers(extent[0].buffer(1e-6), found)
    assert found.is_valid


def _with_footprints(collection: Collection, shapes: list[Any]) -> Collection:
    table = collection.to_table()
    wkb = pa.array([None if shape is None else shapely.to_wkb(shape) for shape in shapes], pa.binary())
    return Collection(table.set_column(table.schema.get_field_index("geometry"), "geometry", wkb))


def test_an_index_is_extents_cut_to_footprints(mixed: Collection) -> None:
    """Half a footprint halves, none or a wrong one cuts nothing; in each record's own CRS and in another."""
    facts = scene_table(mixed, ["B1"])
    outlines = [facts.grid(i).footprint for i in range(5)]
    lonlat = [
        transform_geometries(np.array([o], dtype=object), facts.crs_of(i), LONLAT)[0] for i, o in enumerate(outlines)
    ]
    xmin, ymin, xmax, ymax = lonlat[1].bounds
    half = shapely.box(xmin, ymin, (xmin + xmax) / 2, ymax)
    shapes = [lonlat[0], half, None, shapely.box(80, 10, 81, 11), lonlat[4]]
    facts = scene_table(_with_footprints(mixed, shapes), ["B1"])
    for crs in (UTM, "EPSG:32634", LONLAT, "EPSG:3035"):
        index = scene_index(facts, crs)
        assert index["rid"].tolist() == facts.rows.tolist()
        assert index.index.closed == "both"
        for i, shape in enumerate(index.geometry):
            moved = transform_geometries(np.array([outlines[i]], dtype=object), facts.crs_of(i), crs)[0]
            share = shape.area / moved.area
            assert share == pytest.approx(0.5 if i == 1 else 1.0, abs=0.02 if i == 1 else 1e-9)
            assert moved.buffer(2.5 / (1e5 if crs == LONLAT else 1)).covers(shape)


def test_tiles_lie_where_the_files_tiles_lie(mixed: Collection) -> None:
    """On the dataset's grid exactly, whichever way the raster runs; elsewhere about there."""
    facts = scene_table(mixed, ["B1"])
    layout = tile_layout(facts, UTM)
    assert layout.rows.tolist() == [0, 1, 2, 3, 4]
    # 40 rows are 3 tiles of 16 (48 rows), 50 columns are 4 (64): counted from the raster's own first corner.
    left_top = [(500000, 5000000), (500000, 4990000 + 480), (520000 - 640, 5000000)]
    assert list(zip(layout.x0[:3].tolist(), layout.y0[:3].tolist(), strict=True)) == left_top
    assert layout.tile_width[:3].tolist() == layout.tile_height[:3].tolist() == [160.0] * 3
    bounds = shapely.bounds(scene_index(facts, UTM).geometry.to_numpy())
    np.testing.assert_allclose(layout.x0[3:], bounds[3:, 0])
    np.testing.assert_allclose(layout.y0[3:], bounds[3:, 3])
    assert layout.tile_width[4] == pytest.approx(160, rel=0.1)
    assert layout.tile_height[4] == pytest.approx(160, rel=0.1)


def test_a_row_without_a_place_is_named(tmp_path: Any) -> None:
    """By its row in the Collection, though others come before it."""
    pixels = np.ones((1, 16, 16), np.uint8)
    make_cog(tmp_path / "a.tif", pixels)
    make_cog(tmp_path / "b.tif", pixels, crs=None)
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet")
    with pytest.raises(UsageError, match="Row 1 of the Collection is not georeferenced"):
        scene_table(collection, ["B1"])


def test_a_large_dataset_travels_light(mixed: Collection) -> None:
    """Under 90 bytes a record for facts and index together, whatever the ids and footprints are like."""
    one = mixed.where(pc.field("proj:epsg") == 32633).to_table().slice(0, 1)
    count = 3000
    ids = pa.array([f"a-long-identifier-of-a-scene-{i * 7919 % count:06d}" for i in range(count)])
    many = pa.concat_tables([one] * count).combine_chunks().set_column(0, "id", ids)
    facts = scene_table(Collection(many), ["B1"])
    index = scene_index(facts, UTM)
    arrays = [getattr(facts, n) for n in ("rows", "crs_codes", "transforms", "shapes", "tiles", "times", "id_ranks")]
    whole = sum(len(pickle.dumps(array)) for array in arrays)
    rest, packed = facts.__reduce__()[1]
    assert not any(isinstance(value, np.ndarray) for value in rest.values())
    light = len(packed)
    assert light < whole / 5
    assert light + len(pickle.dumps(pack_index(index))) < 90 * count
