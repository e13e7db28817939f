"""Frequencies of AOIs, placement of chips, and that each position is a pure function."""

from __future__ import annotations

import logging
import pickle

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch.utils.data
from fields import CRS, HOLED, L_SHAPE, PARTS, SQUARE, Plane, box_of, boxes, centres, chi_squared
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.geo.regions import TriangleRegion
from rasteret_ml.samplers.random import ChipPlacement, Redraws, max_overlaps, overlaps
from rasteret_ml.samplers.ranks import uniforms

SHAPES = [L_SHAPE, HOLED, PARTS]
FIRST = (8735.189474876994, 3777.964388317876)
SECOND = (1, 1181.7349522844515, 1974.591166178127)


def fields(count=12):
    """Boxes of growing area with four unevenly distributed crops."""
    side = 100.0 + 40 * np.arange(count)
    x, y = 700.0 * (np.arange(count) % 4) + 500, 1500.0 * (np.arange(count) // 4) + 500
    columns = {"crop": np.array(list("aaaaaabbbccd"))[:count], "w": np.arange(count) % 5, "area": side**2}
    return gpd.GeoDataFrame(columns, geometry=list(shapely.box(x, y, x + side, y + side)), crs=CRS)


def frequencies(count=20_000, **options):
    """How often each field was drawn."""
    rows = [a.row for a in rm.RandomAOISampler(Plane(SQUARE), 4, count, seed=5, **{"aois": fields()} | options)]
    return np.bincount(rows, minlength=12)


def expected(weights, count=20_000):
    weights = np.asarray(weights, float)
    return weights / weights.sum() * count


@pytest.mark.slow
def test_chips_are_distributed_by_area():
    """Centres lie in L-shaped, holed and multi-part polygons, each in proportion to its area."""
    sampler = rm.RandomAOISampler(Plane(SQUARE), 8, 100_000, aois=SHAPES, aois_crs=CRS, seed=9)
    aois = list(sampler)
    assert len(aois) == 100_000
    rows = np.array([a.row for a in aois])
    at = shapely.points(centres(aois))
    for row, shape in enumerate(SHAPES):
        shapely.prepare(shape)
        assert shapely.intersects(shape, at[rows == row]).all()
    # The area that centres may lie in: half a chip from the scenes' edge.
    room = shapely.area(shapely.intersection(SHAPES, shapely.box(40, 40, 9960, 9960)))
    statistic, limit = chi_squared(np.bincount(rows), expected(room, 100_000))
    assert statistic < limit
    cells = shapely.box(
        *(np.array([(x, y, x + 500, y + 500) for x in range(0, 9000, 500) for y in range(0, 9000, 500)]).T)
    )
    share = shapely.area(shapely.intersection(HOLED, cells))
    counts = np.array([len(found) for found in np.split(*_by_cell(cells, at[rows == 1]))])
    full = share > 20_000
    statistic, limit = chi_squared(counts[full], expected(share, counts.sum())[full])
    assert statistic < limit


def _by_cell(cells, points):
    point, cell = shapely.STRtree(cells).query(points, predicate="intersects")
    order = np.argsort(cell, kind="stable")
    return point[order], np.searchsorted(cell[order], np.arange(1, len(cells)))


@pytest.mark.parametrize(
    "weight", ["w", np.arange(12) % 5, lambda table: table["w"], lambda table: table["crop"].map({"a": 1}).fillna(0)]
)
def test_weights(weight):
    """A column, numbers or a callable; 0 is never drawn."""
    table = fields()
    weights = weight(table) if callable(weight) else table["w"] if isinstance(weight, str) else weight
    counts = frequencies(weight=weight)
    some = np.asarray(weights) > 0
    assert counts[~some].sum() == 0
    statistic, limit = chi_squared(counts[some], expected(weights)[some])
    assert statistic < limit


def test_the_tables_weights_are_the_default():
    """Without weights, areas where centres may lie are used."""
    table = rm.AOITable.of(fields(), weight="w")
    for options, weights in (
        ({"aois": table}, table.weights),
        ({"aois": table, "weight": "area"}, fields()["area"]),
        ({}, fields()["area"]),
        ({"placement": "inside"}, (np.sqrt(fields()["area"]) - 40) ** 2),
    ):
        counts, wanted = frequencies(**options), expected(weights)
        assert counts[wanted == 0].sum() == 0
        statistic, limit = chi_squared(counts[wanted > 0], wanted[wanted > 0])
        assert statistic < limit


@pytest.mark.parametrize("balance", [True, "crop", list("aaaaaabbbccd")])
@pytest.mark.parametrize("weight", [None, np.arange(12) + 1])
def test_balance(balance, weight):
    """Each class is drawn equally often; within a class, weight or area decides."""
    crop = fields()["crop"].to_numpy()
    counts = frequencies(aois=rm.AOITable.of(fields(), label="crop"), balance=balance, weight=weight)
    inside = fields()["area"].to_numpy() if weight is None else weight
    wanted = sum(np.where(crop == c, inside, 0) / inside[crop == c].sum() for c in "abcd")
    statistic, limit = chi_squared(counts, expected(wanted))
    assert statistic < limit
    statistic, limit = chi_squared([counts[crop == c].sum() for c in "abcd"], [5000] * 4)
    assert statistic < limit


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight": "v"}, "no such column"),
        ({"weight": [1, 2]}, "2 values for 12"),
        ({"weight": np.zeros(12)}, "All weights are 0"),
        ({"weight": -np.ones(12)}, "negative"),
        ({"balance": True}, "label="),
        ({"balance": "area"}, "Continuous values cannot be balanced"),
        ({"balance": "crop", "weight": [0] * 11 + [1]}, "whole|All AOIs of a class"),
        ({"balance": ["a"] * 11 + [None]}, r"\[11\] have no class"),
        ({"aois": None, "weight": "w"}, "pass aois="),
        ({"aois": None, "placement": {"min_overlap": 0.5}}, "pass aois="),
        ({"placement": {"min_overlap": 1.5}}, "min_overlap must be between 0 and 1, got 1.5"),
        ({"min_valid": -1}, "min_valid must be between 0 and 1, got -1"),
        ({"min_valid": {"min_valid": 0.5, "max_redraws": 0}}, "max_redraws must be an integer >= 1, got 0"),
        ({"placement": {"edge": 3}}, "placement must have only the fields mode, .*; got edge"),
        ({"min_valid": "most"}, "min_valid must be between 0 and 1, got 'most'"),
        ({"placement": {"inset": -3}}, "inset must be a finite distance >= 0"),
        ({"outside": "keep"}, "outside must be 'raise' or 'drop', got 'keep'"),
        ({"placement": {"inset": 100}}, r"leaves nothing of AOIs \[0, 1, 2\]"),
        ({"placement": {"min_overlap": 1}, "size": 20}, r"No chip .* can overlap AOIs \[0, 1, 2\] by 1 "),
    ],
)
def test_impossible_options_are_refused(options, text):
    """The constructor raises an error that lists the rows."""
    with pytest.raises(UsageError, match=text):
        rm.RandomAOISampler(Plane(SQUARE), **{"size": 4, "length": 10, "aois": fields()} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"placement": {"inset": 100}},
        {"placement": ChipPlacement(min_overlap=1), "size": 20},
        {"placement": "inside", "size": 20},
    ],
)
def test_aois_without_chips_can_be_dropped(options, caplog):
    """They are logged by row, and the others keep their rows."""
    with caplog.at_level(logging.WARNING):
        sampler = rm.RandomAOISampler(
            Plane(SQUARE), **{"size": 4, "length": 900, "aois": fields(), "outside": "drop"} | options
        )
    assert "[0, 1, 2]" in caplog.text
    assert {a.row for a in sampler} == set(range(3, 12))
    shapes = fields().geometry
    assert all(a.geometry.equals(shapes[a.row]) for a in sampler)


def test_aois_outside_every_scene_can_be_dropped(caplog):
    """All samplers drop them, unless none is left."""
    table = [shapely.box(5e5, 0, 5.1e5, 10), L_SHAPE, shapely.box(-9e5, 0, -8e5, 10)]
    for make in (
        lambda **o: rm.RandomAOISampler(Plane(SQUARE), 4, 20, aois=table, aois_crs=CRS, **o),
        lambda **o: rm.GridAOISampler(Plane(SQUARE), 100, aois=table, aois_crs=CRS, **o),
        lambda **o: rm.PerAOISampler(Plane(SQUARE), 4, table, aois_crs=CRS, **o),
    ):
        with pytest.raises(GeometryError, match=r"AOI 0 .*outside every scene.* 1 more .*\[0, 2\]"):
            make()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert {a.row for a in make(outside="drop")} == {1}
        assert "[0, 2]" in caplog.text
    with pytest.raises(GeometryError, match="outside every scene"):
        rm.PerAOISampler(Plane(SQUARE), 4, table[:1], aois_crs=CRS, outside="drop")


def test_inset_keeps_chips_away_from_the_edge():
    """It applies to centres, or (inside) to whole chips."""
    for placement, tested in (("centre", shapely.centroid), ("inside", lambda chips: chips)):
        sampler = rm.RandomAOISampler(
            Plane(SQUARE), 10, 2000, aois=[L_SHAPE, HOLED], aois_crs=CRS, placement={"mode": placement, "inset": 150}
        )
        edges = np.array([L_SHAPE.boundary, HOLED.boundary], dtype=object)
        aois = list(sampler)
        assert shapely.distance(edges[[a.row for a in aois]], tested(boxes(aois))).min() >= 150 - 1e-3
    scenes = rm.RandomAOISampler(Plane(SQUARE), 10, 500, placement={"inset": 3000})
    assert shapely.covers(shapely.box(2999, 2999, 7001, 7001), boxes(scenes)).all()


def test_min_overlap_is_reached_if_possible():
    """In a strip as wide as the chip, a quarter is easily reached and a full overlap is impossible."""
    strip = shapely.box(1000, 1000, 1320, 9000)
    for share in (0.25, 0.7, 0.9):
        sampler = rm.RandomAOISampler(
            Plane(SQUARE), 32, 1500, aois=[strip, HOLED], aois_crs=CRS, placement={"min_overlap": share}
        )
        aois = list(sampler)
        chips = boxes(aois)
        own = np.array([strip, HOLED], dtype=object)[[a.row for a in aois]]
        found = shapely.area(shapely.intersection(own, chips)) / 320**2
        assert found.min() >= share
        assert [tuple(sampler.at(i)) for i in (0, 700, 1499)] == [tuple(aois[i]) for i in (0, 700, 1499)]
    plain = [a.row for a in rm.RandomAOISampler(Plane(SQUARE), 32, 1500, aois=[strip, HOLED], aois_crs=CRS)]
    assert plain == [a.row for a in aois]  # a further try stays in its polygon
    thin = shapely.Polygon([(1000, 1000), (1200, 1000), (5000, 5000), (4800, 5000)])
    best = rm.RandomAOISampler(Plane(SQUARE), 20, 50, aois=[thin], aois_crs=CRS, placement={"min_overlap": 1})
    chance = rm.RandomAOISampler(Plane(SQUARE), 20, 50, aois=[thin], aois_crs=CRS)
    met, by_chance = (shapely.area(shapely.intersection(thin, boxes(sampler))) for sampler in (best, chance))
    assert (met >= by_chance - 1e-6).all()
    assert met.mean() > 1.1 * by_chance.mean()


@examples(40)
@given(st.integers(0, 10**6))
def test_overlaps_equal_areas(seed):
    """For chips inside, partly inside and outside; none exceeds the upper bound."""
    rng = np.random.default_rng(seed)
    shapes = np.array(SHAPES, dtype=object)[rng.integers(0, 3, 50)]
    corners, sizes = rng.uniform(-500, 10500, (50, 2)), rng.uniform(1, 2500, (50, 2))
    chips = shapely.box(corners[:, 0], corners[:, 1] - sizes[:, 1], corners[:, 0] + sizes[:, 0], corners[:, 1])
    found = overlaps(shapes, corners, sizes)
    np.testing.assert_allclose(found, shapely.area(shapely.intersection(shapes, chips)) / sizes.prod(axis=1), atol=1e-9)
    assert (found <= max_overlaps(shapes, sizes) + 1e-9).all()


def test_spares_are_further_draws_from_the_same_polygon():
    """They are pure functions of the position with the same identity, time and size."""
    table = rm.AOITable.of(fields(), label="crop")
    options = {"aois": table, "seed": 3, "balance": True}
    sampler = rm.RandomAOISampler(
        Plane(SQUARE), (4, 6), 1500, min_valid=Redraws(min_valid=0.75, max_redraws=2), **options
    )
    aois = list(sampler)
    plain = list(rm.RandomAOISampler(Plane(SQUARE), (4, 6), 1500, **options))
    assert [tuple(a) for a in aois] == [tuple(a) for a in plain]
    assert all(a.spares == () and a.min_valid == 0 for a in plain)
    shapes = np.asarray(fields().geometry)
    for aoi in aois[::50]:
        assert aoi.min_valid == 0.75
        assert len(set(aoi.spares)) == 2
        for k in range(2):
            spare = aoi.spare(k)
            assert (spare.row, spare.label, spare.position, spare[2]) == (aoi.row, aoi.label, aoi.position, aoi[2])
            assert spare[:2] != aoi[:2]
            assert box_of(spare).area == pytest.approx(box_of(aoi).area)
            assert shapes[aoi.row].buffer(1e-6).contains(box_of(spare).centroid)
            assert spare.spares == ()
        with pytest.raises(IndexError):
            aoi.spare(2)
    assert sampler.at(1234).details == aois[1234].details
    assert pickle.loads(pickle.dumps(aois[7])).details == aois[7].details
    spares = [rm.RandomAOISampler(Plane(SQUARE), 4, 200, min_valid=0.5, locality=k).at(11).spares for k in (None, 2)]
    assert all(len(found) == 3 for found in spares)
    first = {(a[0].start, a[1].start): a.spares for a in rm.RandomAOISampler(Plane(SQUARE), 4, 200, min_valid=0.5)}
    local = {
        (a[0].start, a[1].start): a.spares
        for a in rm.RandomAOISampler(Plane(SQUARE), 4, 200, min_valid=0.5, locality=2)
    }
    assert first == local


def test_spares_are_uniform_in_their_polygon():
    """Like the first draws (chi-squared over quarters of an L)."""
    quarters = [L_SHAPE & shapely.box(x, y, x + 4500, y + 4500) for x in (0, 4500) for y in (0, 4500)]
    sampler = rm.RandomAOISampler(
        Plane(SQUARE), 4, 4000, aois=[L_SHAPE], aois_crs=CRS, min_valid={"min_valid": 0.1, "max_redraws": 1}
    )
    at = shapely.points(centres([a.spare(0) for a in sampler]))
    kept = [q for q in quarters if q.area]
    counts = [shapely.intersects(q, at).sum() for q in kept]
    statistic, limit = chi_squared(counts, expected(shapely.area(kept), 4000))
    assert statistic < limit


def test_attempts_are_independent_of_one_another():
    """The first attempt is the default."""
    np.testing.assert_array_equal(uniforms(3, 5, range(10, 30), 0), uniforms(3, 5, range(10, 30)))
    drawn = [uniforms(3, 5, range(4000), k).ravel() for k in range(4)]
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.04
    np.testing.assert_array_equal(uniforms(3, 5, range(100, 109), 2), uniforms(3, 5, range(200), 2)[100:109])


def test_draws_are_stable_across_versions():
    """A seed gives the same chips as in earlier versions."""
    a = rm.RandomAOISampler(Plane(SQUARE), 64, 10, seed=3).at(2)
    assert (a[0].start, a[1].start) == pytest.approx((FIRST[0], FIRST[1]), abs=1e-6)
    a = rm.RandomAOISampler(Plane(SQUARE), 64, 10, seed=3, aois=[L_SHAPE, HOLED], aois_crs=CRS).at(7)
    assert (a.row, a[0].start, a[1].start) == pytest.approx(SECOND, abs=1e-6)


def test_many_regions_are_triangulated_lazily(monkeypatch):
    """Points are the same as if all regions were triangulated first."""
    regions = np.array([HOLED, L_SHAPE, PARTS, *fields().geometry], dtype=object)
    numbers = uniforms(1, 0, range(500))[:, :3]
    points, owners = TriangleRegion(regions).points(numbers)
    monkeypatch.setattr("rasteret_ml.geo.regions._FEW", 3)
    lazy = TriangleRegion(regions)
    for start in range(0, 500, 50):
        found, own = lazy.points(numbers[start : start + 50])
        np.testing.assert_array_equal(own, owners[start : start + 50])
        np.testing.assert_allclose(found, points[start : start + 50], atol=1e-6)


def windows():
    """An open window, one inside the scenes' times, one that starts before them and one after them."""
    table = fields(4)
    table["from"] = [None, "2023-03-01", "2020-01-01", "2024-03-01"]
    table["to"] = [None, "2023-04-30", "2023-02-01", "2024-06-01"]
    return rm.AOITable.of(table, time=("from", "to"))


@pytest.mark.parametrize("kind", ["random", "grid", "each"])
def test_time_windows(kind, caplog):
    """An AOI's window is intersected with the time of interest."""
    make = {
        "random": lambda **o: rm.RandomAOISampler(Plane(SQUARE), 4, 300, **o),
        "grid": lambda **o: rm.GridAOISampler(Plane(SQUARE), 4, **o),
        "each": lambda **o: rm.PerAOISampler(Plane(SQUARE), 4, **o),
    }[kind]
    with pytest.raises(GeometryError, match=r"windows of AOIs \[3\]"):
        make(aois=windows())
    with caplog.at_level(logging.WARNING):
        sampler = make(aois=windows(), outside="drop")
    assert "[3]" in caplog.text
    found = {a.row: (a[2].start, a[2].stop) for a in sampler}
    first, last = pd.Timestamp("2023-01-01"), pd.Timestamp("2023-12-31")
    april = pd.Timestamp("2023-04-30T23:59:59.999999")
    assert found[0] == (first, last)
    assert found[1] == (pd.Timestamp("2023-03-01"), april)
    assert found[2] == (first, pd.Timestamp("2023-02-01T23:59:59.999999"))
    assert sampler.times == (first, last)
    some = make(aois=windows().where([1, 2]), time="2023-01-15/2023-03-15")
    assert {a.row: (a[2].start.date().isoformat(), a[2].stop.date().isoformat()) for a in some} == {
        1: ("2023-03-01", "2023-03-15"),
        2: ("2023-01-15", "2023-02-01"),
    }
    assert some.times[0] == pd.Timestamp("2023-01-15")
    assert some.times[1].floor("s") == pd.Timestamp("2023-03-15T23:59:59")  # the whole last day


class Positions:
    """A dataset whose samples identify their queries."""

    def __getitem__(self, aoi):
        return aoi.position, aoi.row, aoi.details.epoch, aoi[0].start, aoi.spares


@pytest.mark.parametrize("kind", ["random", "local", "grid", "each"])
def test_the_order_is_the_same_at_any_number_of_workers(kind):
    """Also after pickling, at any position, in any epoch."""
    table = rm.AOITable.of(fields(), label="crop")
    make = {
        "random": lambda: rm.RandomAOISampler(
            Plane(SQUARE),
            8,
            60,
            aois=table,
            balance=True,
            placement={"min_overlap": 0.5},
            min_valid=0.5,
            outside="drop",
        ),
        "local": lambda: rm.RandomAOISampler(Plane(SQUARE), 8, 60, aois=table, locality=3, min_valid=0.5),
        "grid": lambda: rm.GridAOISampler(Plane(SQUARE), 16, aois=table),
        "each": lambda: rm.PerAOISampler(
            Plane(SQUARE), 8, table, chips=3, placement="random", shuffle=True, min_valid=0.5
        ),
    }[kind]
    passes = []
    for workers in (0, 1, 2):
        sampler = make()
        loader = torch.utils.data.DataLoader(
            Positions(), batch_size=7, sampler=sampler, num_workers=workers, collate_fn=list
        )
        seen = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            seen += [item for batch in loader for item in batch]
        passes.append(seen)
    assert passes[0] == passes[1] == passes[2]
    assert len(passes[0]) == 2 * len(sampler)
    again = pickle.loads(pickle.dumps(sampler))
    assert [tuple(again.at(i)) for i in range(len(again))] == [tuple(a) for a in sampler]
    with pytest.raises(IndexError):
        sampler.at(len(sampler))


def test_aois_carry_labels():
    """Classes are integers, values are floats, and without labels it is None."""
    for label, kind, wanted in (("crop", int, [0, 1, 2, 3]), ("area", float, fields()["area"].tolist())):
        table = rm.AOITable.of(fields(), label=label)
        for sampler in (
            rm.RandomAOISampler(Plane(SQUARE), 4, 300, aois=table),
            rm.GridAOISampler(Plane(SQUARE), 4, aois=table),
            rm.PerAOISampler(Plane(SQUARE), 4, table),
        ):
            for aoi in sampler:
                assert type(aoi.label) is kind
                assert aoi.label == table.labels[aoi.row]
                assert aoi.label in wanted
                assert sampler.aois.row(aoi)["w"] == aoi.row % 5
    assert next(iter(rm.RandomAOISampler(Plane(SQUARE), 4, 1))).label is None
