"""A small realistic scene set: four Sentinel-2-like scenes of one date with labels that follow the pixels.

Land cover comes from smooth random fields, pixels from the land cover's spectra with texture, relief and noise,
so that a model has something to learn and something to get wrong. Files are COGs: one per band and scene, and
one label raster over all of them.

    python examples/demo_scenes.py scenes        writes them to a folder
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from affine import Affine

from rasteret_ml.testing import make_cog

BANDS = ("B02", "B03", "B04", "B08")
CLASSES = ("water", "forest", "cropland", "bare soil")
SCENE, PIXEL = 512, 10.0  # pixels along a side, metres
WEST, NORTH, CRS = 499980.0, 5100000.0, "EPSG:32633"
NODATA_EDGE = 12  # the first scene has no data in its westernmost columns

# Reflectance x 10000 in BANDS, roughly as Sentinel-2 sees them in August.
SPECTRA = np.array([[520, 480, 330, 180], [330, 480, 330, 2900], [620, 900, 780, 3300], [1200, 1500, 1900, 2500]])


def smooth(rng: np.random.Generator, size: int, detail: int) -> npt.NDArray[np.float64]:
    """A random field `[size, size]` of zero mean and unit spread, power falling with frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    power = 1 / np.maximum(frequency, 1 / size) ** 1.6 * (frequency < detail / size)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * power, s=(size, size))
    return (field - field.mean()) / field.std()


def land_cover(rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """Classes 1 to 4 `[size, size]`: lakes, forest on heights, fields in blocks, bare ones among them."""
    height, wet = smooth(rng, size, 40), smooth(rng, size, 24)
    fields = np.kron(rng.random((size // 32, size // 32)), np.ones((32, 32)))
    cover = np.where(fields > 0.72, 4, 3).astype(np.uint8)
    cover[height > 0.25] = 2
    cover[wet < -0.9] = 1
    return cover


def pixels(rng: np.random.Generator, cover: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Bands `[4, H, W]` that follow the land cover: spectra, texture, sun on slopes, sensor noise."""
    size = cover.shape[0]
    base = SPECTRA[cover - 1].transpose(2, 0, 1).astype(np.float64)
    light = 1 + 0.08 * np.gradient(smooth(rng, size, 60))[0] * 30
    texture = 1 + 0.15 * smooth(rng, size, 200) + 0.04 * np.stack([smooth(rng, size, 200) for _ in BANDS])
    noise = rng.normal(0, 45, base.shape)
    return np.clip(base * light.clip(0.6, 1.5) * texture + noise, 1, 15000).astype(np.uint16)


def make_scenes(folder: Path) -> tuple[list[str], str]:
    """Write the scenes once; returns the image files and the label file, relative to `folder`."""
    images = [f"T33_{r}{c}_20230815_{band}.tif" for r in range(2) for c in range(2) for band in BANDS]
    label = "land_cover.tif"
    if all((folder / name).exists() for name in [*images, label, "complete"]):
        return images, label
    rng = np.random.default_rng(7)
    cover = land_cover(rng, 2 * SCENE)
    bands = pixels(rng, cover)
    bands[:, :SCENE, :NODATA_EDGE] = 0
    for r in range(2):
        for c in range(2):
            corner = Affine(PIXEL, 0, WEST + c * SCENE * PIXEL, 0, -PIXEL, NORTH - r * SCENE * PIXEL)
            part = bands[:, r * SCENE : (r + 1) * SCENE, c * SCENE : (c + 1) * SCENE]
            for i, band in enumerate(BANDS):
                name = folder / f"T33_{r}{c}_20230815_{band}.tif"
                make_cog(name, part[i], transform=corner, crs=CRS, nodata=0, blocksize=256)
    corner = Affine(PIXEL, 0, WEST, 0, -PIXEL, NORTH)
    make_cog(folder / label, cover, transform=corner, crs=CRS, nodata=0, blocksize=256)
    (folder / "complete").touch()
    return images, label


@contextmanager
def served(folder: Path) -> Iterator[tuple[list[str], str]]:
    """Make the scenes if need be and serve them on loopback; gives the image URLs and the label URL."""
    images, label = make_scenes(folder)
    command = [sys.executable, "-m", "rasteret_ml.testing", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        base = server.stdout.readline().strip()
        yield [f"{base}/{name}" for name in images], f"{base}/{label}"
    finally:
        server.terminate()
        server.wait(10)


if __name__ == "__main__":
    written, truth = make_scenes(Path(sys.argv[1]))
    print(f"{len(written)} images and {truth} in {sys.argv[1]}")
