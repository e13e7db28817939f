"""More demo data like `demo_scenes`: fields, a scene with gaps, a season, two UTM zones."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import rasterio.features
import shapely
from affine import Affine
from demo_scenes import BANDS, CLASSES, CRS, NORTH, PIXEL, SCENE, SPECTRA, WEST, land_cover, make_scenes, pixels, smooth
from pyproj import Transformer
from shapely.geometry import shape

from rasteret_ml.testing import make_cog

SEASON = ("2023-04-22", "2023-05-17", "2023-06-16", "2023-07-11", "2023-08-15", "2023-09-09")
CLOUD = (0.05, 0.75, 0.15, 0.45, 0.0, 0.3)  # cloud cover of each date, 0 to 1
GREEN = (0.35, 0.7, 1.0, 0.9, 0.5, 0.25)  # greenness of the crops on each date, 0 to 1
TILE = 192  # size of a tile of the season in pixels


def make_fields(folder: Path) -> Path:
    """Write the scenes and `fields.geojson`: polygons of one land cover (column `crop`), at most 64 x 64 pixels."""
    _, label = make_scenes(folder)
    path = folder / "fields.geojson"
    if path.exists():
        return path
    with rasterio.open(folder / label) as file:
        cover, transform = file.read(1), file.transform
    rows, cols = np.indices(cover.shape) // 64
    keys = ((rows * 1000 + cols) * 10 + cover).astype(np.int32)
    polygons = [(shape(s), int(key) % 10) for s, key in rasterio.features.shapes(keys, transform=transform)]
    large = [(polygon, value) for polygon, value in polygons if polygon.area >= 150 * PIXEL**2]
    table = gpd.GeoDataFrame(
        {"crop": [CLASSES[value - 1] for _, value in large], "number": [value for _, value in large]},
        geometry=[p for p, _ in large],
        crs=CRS,
    )
    table["hectares"] = (table.area / 1e4).round(1)
    table.to_file(path)
    return path


def make_gappy(folder: Path) -> tuple[Path, Path]:
    """Write a scene of four bands with gaps, as if clouds were masked, and its labels; water and bare soil are rare."""
    image, label = folder / "gappy_20230815.tif", folder / "gappy_cover.tif"
    if not label.exists():
        rng = np.random.default_rng(11)
        cover = land_cover(rng, SCENE)
        bands = pixels(rng, cover)
        bands[:, smooth(rng, SCENE, 12) > 1.1] = 0
        corner = Affine(PIXEL, 0, WEST, 0, -PIXEL, NORTH)
        make_cog(image, bands, transform=corner, crs=CRS, nodata=0, descriptions=BANDS)
        make_cog(label, cover, transform=corner, crs=CRS, nodata=0)
    return image, label


def make_season(folder: Path) -> list[Path]:
    """Write STAC items for six dates and two adjacent tiles: four bands at 10 m, scene classification (SCL) at 20 m."""
    rng = np.random.default_rng(21)
    cover = land_cover(rng, 2 * TILE)[:TILE]
    items = []
    for date, share, green in zip(SEASON, CLOUD, GREEN, strict=True):
        bands, scl = _cloudy(rng, *_on_date(rng, cover, green), share)
        if date == SEASON[3]:  # the edge of a swath
            outside = np.arange(2 * TILE)[None] + np.arange(TILE)[:, None] // 3 < 150
            bands[:, outside], scl[outside] = 0, 0
        for tile in range(2):
            columns = np.s_[..., tile * TILE : (tile + 1) * TILE]
            items.append(_write_item(folder, date, f"33TV{'MN'[tile]}", tile, bands[columns], scl[columns]))
    return items


def make_season_cover(folder: Path) -> Path:
    """Write the land cover of the season as a label raster."""
    path = folder / "season_cover.tif"
    if not path.exists():
        cover = land_cover(np.random.default_rng(21), 2 * TILE)[:TILE]  # as in make_season
        make_cog(path, cover, transform=Affine(PIXEL, 0, WEST, 0, -PIXEL, NORTH), crs=CRS, nodata=0)
    return path


def _on_date(
    rng: np.random.Generator, cover: npt.NDArray[np.uint8], green: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Return cloud-free bands and SCL; crops lie between bare soil and full green."""
    class_spectra = SPECTRA.astype(np.float64)
    class_spectra[2] = green * class_spectra[2] + (1 - green) * class_spectra[3]
    spectra = class_spectra[cover - 1].transpose(2, 0, 1)
    noise = 1 + 0.06 * smooth(rng, cover.shape[1], 120)[: cover.shape[0]] + rng.normal(0, 0.02, spectra.shape)
    return spectra * noise, np.array([6, 4, 4 if green > 0.4 else 5, 5], np.uint8)[cover - 1]


def _cloudy(
    rng: np.random.Generator, bands: npt.NDArray[np.float64], scl: npt.NDArray[np.uint8], share: float
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Add clouds to about `share` of the pixels, and their shadows to the north-west."""
    rows, field = len(scl), smooth(rng, scl.shape[1], 14)
    threshold = np.quantile(field[:rows], 1 - share) if share else np.inf
    cloud, shadow = field[:rows] > threshold, np.roll(field, (-9, -9), (0, 1))[:rows] > threshold
    opacity = np.clip((field[:rows] - threshold) * 4, 0, 1) if share else np.zeros(scl.shape)
    bands = np.where(shadow & ~cloud, bands * 0.45, bands)
    bands = bands * (1 - opacity) + opacity * rng.normal(7500, 250, bands.shape)
    scl = np.where(cloud, 9, np.where(shadow, 3, scl)).astype(np.uint8)
    return np.clip(bands, 1, 15000).astype(np.uint16), scl


def _write_item(
    folder: Path, date: str, tile: str, column: int, bands: npt.NDArray[np.uint16], scl: npt.NDArray[np.uint8]
) -> Path:
    name = f"S2_{tile}_{date.replace('-', '')}"
    item = folder / name / f"{name}.json"
    if item.exists():
        return item
    west = WEST + column * TILE * PIXEL
    fine = Affine(PIXEL, 0, west, 0, -PIXEL, NORTH)
    for band, data in zip(BANDS, bands, strict=True):
        make_cog(folder / name / f"{band}.tif", data, transform=fine, crs=CRS, nodata=0)
    make_cog(folder / name / "SCL.tif", scl[::2, ::2], transform=fine @ Affine.scale(2), crs=CRS, nodata=0)
    footprint = _lonlat(shapely.box(west, NORTH - TILE * PIXEL, west + TILE * PIXEL, NORTH))
    clouds = 100 * float(np.isin(scl, (8, 9, 10)).mean())
    item.write_text(
        json.dumps(
            {
                "type": "Feature",
                "stac_version": "1.0.0",
                "id": name,
                "properties": {"datetime": f"{date}T10:0{column}:00Z", "eo:cloud_cover": clouds, "proj:epsg": 32633},
                "geometry": shapely.geometry.mapping(footprint),
                "bbox": list(footprint.bounds),
                "assets": {band: {"href": f"./{band}.tif"} for band in (*BANDS, "SCL")},
                "links": [],
            }
        )
    )
    return item


def _lonlat(polygon: shapely.Geometry) -> shapely.Geometry:
    transformer = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
    return shapely.transform(polygon, lambda xy: np.column_stack(transformer.transform(*xy.T)))


def make_zones(folder: Path) -> tuple[list[Path], Path]:
    """Write overlapping scenes on either side of the border of UTM zones 32 and 33, and one label raster in zone 33."""
    label = folder / "zones_cover.tif"
    images = [folder / f"zone{zone}_20230815.tif" for zone in (32, 33)]
    if label.exists():
        return images, label
    rng = np.random.default_rng(31)
    size, (x0, y0) = (
        640,
        (264600.0, 5103000.0),
    )  # size and corner of the land cover in zone 33; it contains longitude 12
    cover = land_cover(rng, size)
    bands = pixels(rng, cover)
    for path, epsg, left, top in zip(images, (32632, 32633), (729400.0, 267400.0), (5102500.0, 5102600.0), strict=True):
        x, y = left + PIXEL * (np.arange(340) + 0.5), top - PIXEL * (np.arange(540) + 0.5)
        x, y = Transformer.from_crs(epsg, 32633, always_xy=True).transform(*np.meshgrid(x, y))
        col, row = np.floor((x - x0) / PIXEL).astype(int), np.floor((y0 - y) / PIXEL).astype(int)
        inside = (col >= 0) & (col < size) & (row >= 0) & (row < size)
        observed = np.where(inside, bands[:, row.clip(0, size - 1), col.clip(0, size - 1)], 0)
        corner = Affine(PIXEL, 0, left, 0, -PIXEL, top)
        make_cog(path, observed, transform=corner, crs=f"EPSG:{epsg}", nodata=0, descriptions=BANDS)
    make_cog(label, cover, transform=Affine(PIXEL, 0, x0, 0, -PIXEL, y0), crs=CRS, nodata=0)
    return images, label
