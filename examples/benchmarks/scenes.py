"""The files to read: generated scenes of four single-band GeoTIFFs; a seed always gives the same bytes."""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.shutil import copy as copy_raster

BANDS = ("B1", "B2", "B3", "B4")
TILE = 512
RES = 10.0
CRS = "EPSG:32633"
ORIGIN = (300_000.0, 5_400_000.0)
DATES = 15
"""Number of dates of the time series."""
HEADER_FILES = 4
"""Number of different files behind the many URLs of the header benchmark."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Number, size and names of the files; equal layouts give equal bytes."""

    scenes: int = 4
    """Number of scenes for random chips."""
    size: int = 6144
    """Rows and columns of a scene in pixels."""
    seed: int = 0
    """Seed of all random numbers."""
    version: int = 1
    """Version of the generator."""

    def name(self, scene: int, band: str) -> str:
        """Return the path of a scene's band; every scene has its own date."""
        return f"scenes/S{scene:02d}_202306{scene % 28 + 1:02d}_{band}.tif"

    def series_name(self, date: int) -> str:
        """Return the path of a date of the time series."""
        return f"series/T_202307{date + 1:02d}_B1.tif"

    def corner(self, scene: int) -> tuple[float, float]:
        """Return the upper left corner (x, y) of a scene; scenes lie a tile apart, so that no chip lies in two."""
        return ORIGIN[0] + scene * (self.size + TILE) * RES, ORIGIN[1]

    def files(self) -> list[tuple[str, ...]]:
        """Return the paths relative to the folder, a tuple of bands for each scene."""
        return [tuple(self.name(scene, band) for band in BANDS) for scene in range(self.scenes)]


def prepare(folder: Path | None, layout: Layout, workers: int) -> Path:
    """Return the folder with the files of `layout`; generate them unless its manifest lists the same layout."""
    folder = folder or Path(tempfile.gettempdir()) / "rasteret_ml_benchmark"
    manifest = folder / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text()) == asdict(layout):
        return folder
    if folder.exists() and any(folder.iterdir()) and not manifest.exists():
        raise SystemExit(f"--data must be a new or empty folder or one of this program, got {folder}.")
    manifest.unlink(missing_ok=True)
    for name in ("scenes", "series", "headers"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    jobs: list[tuple[Any, ...]] = [(_write_band, folder, layout, s, b) for s in range(layout.scenes) for b in range(4)]
    jobs += [(_write_date, folder, layout, date) for date in range(DATES)]
    jobs += [(_write_header_file, folder, number) for number in range(HEADER_FILES)]
    print(f"Generating {len(jobs)} files in {folder} …", flush=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(*job) for job in jobs]:
            future.result()
    manifest.write_text(json.dumps(asdict(layout)))
    return folder


def _write_band(folder: Path, layout: Layout, scene: int, band: int) -> None:
    x, y = layout.corner(scene)
    _write(folder / layout.name(scene, BANDS[band]), layout.size, (x, y), (layout.seed, scene, band))


def _write_date(folder: Path, layout: Layout, date: int) -> None:
    size = min(layout.size, 4 * TILE)
    _write(folder / layout.series_name(date), size, ORIGIN, (layout.seed, 1000, date))


def _write(path: Path, size: int, corner: tuple[float, float], seed: tuple[int, int, int]) -> None:
    """Write a band, one row of tiles at a time; deflate with predictor 2 makes it about 1.6 times smaller."""
    terrain = _terrain(size, np.random.default_rng((seed[0], seed[1])))
    rng = np.random.default_rng(seed)
    parcels = rng.integers(0, 1200, (size // 48 + 1, size // 64 + 1))
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "height": size, "width": size, "crs": CRS}
    profile |= {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "predictor": 2}
    transform = Affine(RES, 0, corner[0], 0, -RES, corner[1])
    with rasterio.open(path, "w", **profile, transform=transform) as file:
        for top in range(0, size, TILE):
            rows = np.arange(top, min(top + TILE, size))
            pixels = _bilinear(terrain, rows / 8, np.arange(size) / 8)
            pixels += parcels[rows // 48][:, np.arange(size) // 64]
            pixels += 28 * rng.standard_normal(pixels.shape, np.float32)
            np.clip(pixels, 1, 10_000, out=pixels)
            window = rasterio.windows.Window(0, top, size, len(rows))
            file.write(pixels.astype(np.uint16), 1, window=window)


def _terrain(size: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Make fractal terrain at an eighth of the resolution: octaves of noise, each twice as fine and half as high."""
    small = size // 8 + 2
    terrain = np.zeros((small, small), np.float32)
    cells, height = 4, 1500.0
    while cells < small:
        octave = rng.random((cells + 2, cells + 2), np.float32) * height
        position = np.arange(small) * (cells / small)
        terrain += _bilinear(octave, position, position)
        cells, height = cells * 2, height / 2
    return terrain


def _bilinear(values: npt.NDArray[np.float32], rows: Any, cols: Any) -> npt.NDArray[np.float32]:
    """Interpolate at fractional rows and columns, one axis after the other."""
    r, c = rows.astype(int), cols.astype(int)
    down, across = (rows - r).astype(np.float32)[:, None], (cols - c).astype(np.float32)[None, :]
    between = values[r] * (1 - down) + values[r + 1] * down
    return np.asarray(between[:, c] * (1 - across) + between[:, c + 1] * across, np.float32)


def _write_header_file(folder: Path, number: int) -> None:
    """Write a COG with the header of a Sentinel-2 band (10,980 x 10,980 pixels, five overviews) and constant pixels."""
    path = folder / "headers" / f"base_{number}.tif"
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "height": 10_980, "width": 10_980, "crs": CRS}
    profile |= {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate"}
    plain = path.with_suffix(".plain.tif")
    transform = Affine(RES, 0, ORIGIN[0] + number * 109_800, 0, -RES, ORIGIN[1])
    with rasterio.open(plain, "w", **profile, transform=transform, nodata=0) as file:
        strip = np.full((TILE, 10_980), number + 1, np.uint16)
        for top in range(0, 10_980, TILE):
            rows = min(TILE, 10_980 - top)
            file.write(strip[:rows], 1, window=rasterio.windows.Window(0, top, 10_980, rows))
    copy_raster(plain, path, driver="COG", compress="deflate", blocksize=TILE, overview_resampling="nearest")
    plain.unlink()
