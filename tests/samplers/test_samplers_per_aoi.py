"""Chips for each AOI, and grids that cover every pixel once."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import shapely
from affine import Affine
from fields import CRS, HOLED, L_SHAPE, PARTS, SQUARE, Plane, box_of, boxes, centres, chi_squared
from torchgeo.datasets import RasterDataset

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog

POINT = shapely.Point(5003, 5004)
LINE = shapely.LineString([(1000, 1000), (1000, 3000), (4000, 3000)])
TINY = shapely.box(6001, 6001, 6003, 6004)
ALL = [L_SHAPE, HOLED, PARTS, POINT, LINE, TINY, shapely.box(200, 300, 400, 900)]


def test_chips_are_centred_on_aois():
    """On the centroid if it lies inside, else on a point of the geometry; in the table's order."""
    aois = list(rm.PerAOISampler(Plane(SQUARE), (6, 4), ALL, aois_crs=CRS))
    assert [a.row for a in aois] == list(range(len(ALL)))
    at = shapely.points(centres(aois))
    assert shapely.distance(np.array(ALL, dtype=object), at).max() < 1e-9
    for row in (3, 5, 6):
        assert shapely.distance(at[row], ALL[row].centroid) < 1e-9
    assert {(round(x.stop - x.start), round(y.stop - y.start)) for x, y, _ in aois} == {(40, 60)}


def test_an_aoi_partly_outside_is_centred_inside_the_scenes():
    """The chip has pixels to read."""
    (aoi,) = rm.PerAOISampler(Plane(SQUARE), 4, [shapely.box(9000, 0, 30000, 10000)], aois_crs=CRS)
    assert centres([aoi])[0].tolist() == pytest.approx([9500, 5000])


def test_random_places_in_aois():
    """Uniform in polygons and along lines; points do not move."""
    sampler = rm.PerAOISampler(Plane(SQUARE), 4, [HOLED, LINE, POINT], aois_crs=CRS, chips=3000, placement="random")
    assert len(sampler) == 9000
    aois = list(sampler)
    rows = np.array([a.row for a in aois])
    assert rows.tolist() == sorted(rows)
    at = shapely.points(centres(aois))
    assert shapely.intersects(HOLED, at[rows == 0]).all()
    sides = [HOLED & shapely.box(x, 0, x + 2500, 9000) for x in (1000, 3500)]
    counts = [shapely.intersects(side, at[rows == 0]).sum() for side in sides]
    statistic, limit = chi_squared(counts, np.array(shapely.area(sides)) / HOLED.area * 3000)
    assert statistic < limit
    assert shapely.distance(LINE, at[rows == 1]).max() < 1e-9
    along = np.histogram(shapely.line_locate_point(LINE, at[rows == 1]), 5, (0, 5000))[0]
    statistic, limit = chi_squared(along, [600] * 5)
    assert statistic < limit
    assert np.unique(shapely.get_coordinates(at[rows == 2]), axis=0).tolist() == [[5003, 5004]]
    sampler.set_epoch(1)
    assert not np.array_equal(centres(sampler), centres(aois))


@pytest.mark.parametrize("pad", [0, 3])
def test_whole_aois_are_extended_to_pixels(pad):
    """The chip is the bounding box extended by less than a pixel, plus the padding, on the pixel grid."""
    plane = Plane(shapely.box(3, 4, 10003, 10004))
    for aoi, shape in zip(rm.PerAOISampler(plane, None, ALL, aois_crs=CRS, pad=pad), ALL, strict=True):
        x, y, _ = aoi
        inner = shapely.box(x.start, y.start, x.stop, y.stop).buffer(-10.0 * pad, join_style="mitre")
        assert inner.buffer(1e-6).covers(shape)
        for start, stop, low, high in zip(
            inner.bounds[:2], inner.bounds[2:], shape.bounds[:2], shape.bounds[2:], strict=True
        ):
            assert low - start < 10 + 1e-6
            assert stop - high < 10 + 1e-6
            assert round((stop - start) / 10, 6) % 1 == 0
            assert stop - start > 5
        assert round((x.start - 3) / 10, 6) % 1 == 0
        assert round((y.stop - 4) / 10, 6) % 1 == 0
    (aoi,) = rm.PerAOISampler(plane, None, [shapely.box(103, 204, 113, 224)], aois_crs=CRS)
    assert box_of(aoi).equals(shapely.box(103, 204, 113, 224))


def test_shuffling_is_a_permutation_of_the_epoch():
    """Each AOI occurs equally often; each epoch has its own, reproducible order."""
    sampler = rm.PerAOISampler(Plane(SQUARE), 4, ALL, aois_crs=CRS, shuffle=True, seed=4)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([a.row for a in sampler])
        assert sorted(orders[-1]) == list(range(len(ALL)))
        assert [a.position for a in sampler] == list(range(len(ALL)))
    assert orders[0] == orders[2] != orders[1]
    other = rm.PerAOISampler(Plane(SQUARE), 4, ALL, aois_crs=CRS, shuffle=True, seed=5)
    assert [a.row for a in other] != orders[0]
    other.start_pass()
    first = [a.row for a in other]
    other.start_pass()
    assert [a.row for a in other] != first


def test_spares_lie_in_the_same_aoi():
    """Points have none."""
    aois = list(rm.PerAOISampler(Plane(SQUARE), 4, ALL, aois_crs=CRS, min_valid={"min_valid": 0.5, "max_redraws": 2}))
    assert [len(a.spares) for a in aois] == [2, 2, 2, 0, 2, 2, 2]
    for aoi in aois:
        for k in range(len(aoi.spares)):
            assert shapely.distance(ALL[aoi.row], shapely.Point(*centres([aoi.spare(k)])[0])) < 1e-6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"aois": None}, "needs aois"),
        ({"size": 0}, "at least one pixel"),
        ({"chips": 0}, "chips must be >= 1, got 0"),
        ({"chips": 2}, "would be the same"),
        ({"pad": 1}, "pad="),
        ({"placement": "inside"}, "'inside'"),
        ({"size": None, "placement": "random"}, "only one place"),
        ({"size": None, "min_valid": 0.5}, "only one place"),
        ({"aois": [POINT], "min_valid": 0.5}, "points have none"),
    ],
)
def test_contradictions_are_refused(options, text):
    """The constructor raises an error."""
    with pytest.raises(UsageError, match=text):
        rm.PerAOISampler(Plane(SQUARE), **{"size": 4, "aois": ALL, "aois_crs": CRS} | options)


@pytest.mark.parametrize("shape", [SQUARE, L_SHAPE, HOLED, PARTS])
@pytest.mark.parametrize("size", [(7, 13), 50, 2000])
def test_a_grid_holds_each_pixel_of_an_area_once(shape, size):
    """No pixel occurs twice, and every pixel with its centre in the polygon occurs."""
    counts = np.zeros((6000, 6000), np.uint8)
    for x, y, _ in rm.GridAOISampler(Plane(SQUARE), size, aois=[shape], aois_crs=CRS):
        row, col = round((20000 - y.stop) / 10), round((x.start + 10000) / 10)
        counts[row : row + round((y.stop - y.start) / 10), col : col + round((x.stop - x.start) / 10)] += 1
    assert counts.max() == 1
    middles = (np.arange(-10000, 20000, 10) + 5.0), (np.arange(20000, -10000, -10) - 5.0)
    inside = shapely.contains_xy(shape, *np.meshgrid(*middles))
    assert (counts[:3000, :3000][inside] == 1).all()
    assert inside.sum() > 1000


@pytest.mark.parametrize("several", [False, True])
def test_every_polygon_has_a_chip_of_the_grid(several):
    """Also a polygon thinner than a millionth of a pixel along the edge of a pixel."""
    sliver, field = shapely.box(1000 - 1e-6, 1000, 1000, 1100), shapely.box(3000, 3000, 3400, 3100)
    if several:
        field = shapely.MultiPolygon([field, shapely.box(5000, 5000, 5100, 5100)])
    for aois, rows in (([sliver, field, sliver], [0, 1, 2]), ([sliver], [0])):
        found = [aoi.row for aoi in rm.GridAOISampler(Plane(SQUARE), 10, aois=aois, aois_crs=CRS)]
        assert sorted(set(found)) == rows
        assert found == sorted(found)


def test_a_grid_with_a_minimum_overlap(caplog):
    """Chips with less are left out; an AOI without any chip is named or dropped."""
    table = [HOLED, shapely.box(9000, 9000, 9100, 9100)]
    whole = list(rm.GridAOISampler(Plane(SQUARE), 20, aois=table, aois_crs=CRS))
    share = (
        shapely.area(shapely.intersection(np.array(table, dtype=object)[[a.row for a in whole]], boxes(whole))) / 40000
    )
    with pytest.raises(UsageError, match=r"AOIs \[1\] have no chip"):
        rm.GridAOISampler(Plane(SQUARE), 20, aois=table, aois_crs=CRS, min_overlap=0.6)
    with caplog.at_level(logging.WARNING):
        some = list(rm.GridAOISampler(Plane(SQUARE), 20, aois=table, aois_crs=CRS, min_overlap=0.6, outside="drop"))
    assert "[1]" in caplog.text
    assert [tuple(a) for a in some] == [tuple(a) for a, s in zip(whole, share, strict=True) if s >= 0.6]
    assert 0 < len(some) < len(whole)
    assert all(a.geometry.equals(HOLED) for a in some)
    shrunk = boxes(rm.GridAOISampler(Plane(SQUARE), 20, aois=[HOLED], aois_crs=CRS, inset=200))
    assert shapely.area(shapely.intersection(shrunk, HOLED.buffer(-200))).min() > 0
    with pytest.raises(UsageError, match="pass aois="):
        rm.GridAOISampler(Plane(SQUARE), 20, min_overlap=0.5)


def test_torchgeo_datasets_can_be_sampled(tmp_path):
    """The AOIs of every sampler read the expected pixels."""
    pixels = np.arange(200 * 200, dtype=np.float32).reshape(1, 200, 200)
    make_cog(tmp_path / "one.tif", pixels, transform=Affine(10, 0, 500000, 0, -10, 5000000), blocksize=64)
    stock = RasterDataset(str(tmp_path))
    field = shapely.box(500203, 4999204, 500907, 4999811)
    for sampler in (
        rm.RandomAOISampler(stock, 16, 5, placement={"min_overlap": 0.5}, aois=[field], aois_crs=CRS),
        rm.RandomAOISampler(stock, 16, 5),
        rm.GridAOISampler(stock, 50, aois=[field], aois_crs=CRS),
        rm.PerAOISampler(stock, None, [field], aois_crs=CRS),
    ):
        assert sampler.reach()[0][0] == CRS
        for aoi in sampler:
            x, y, _ = aoi
            image = stock[aoi]["image"]
            height, width = round((y.stop - y.start) / 10), round((x.stop - x.start) / 10)
            assert image.shape == (1, height, width)
            row, col = (5000000 - y.stop) / 10, (x.start - 500000) / 10
            if isinstance(sampler, rm.RandomAOISampler):
                continue  # between pixels
            assert image[0, 0, 0] == pixels[0, round(row), round(col)]
