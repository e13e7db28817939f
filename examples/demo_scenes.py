"""Demo data: four small Sentinel-2-like scenes of one date with a land-cover raster as labels.

Land cover is made from smooth random fields, and pixels from its spectra with texture, relief and noise, so that
classes are learnable but not trivial. The files are COGs: one per band and scene, and one label raster for all scenes.

    python examples/demo_scenes.py scenes        writes the files to the folder `scenes`
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
SCENE, PIXEL = 512, 10.0  # scene size in pixels, pixel size in metres
WEST, NORTH, CRS = 499980.0, 5100000.0, "EPSG:32633"
NODATA_EDGE = 12  # columns without data at the western edge of the first scene

# Reflectance x 10000 of CLASSES `[4, 4]` in BANDS, roughly as in Sentinel-2 images of August.
SPECTRA = np.array([[520, 480, 330, 180], [330, 480, 330, 2900], [620, 900, 780, 3300], [1200, 1500, 1900, 2500]])


def smooth(rng: np.random.Generator, size: int, detail: int) -> npt.NDArray[np.float64]:
    """Make a random field `[size, size]` of mean 0 and standard deviation 1 whose power falls with frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    power = 1 / np.maximum(frequency, 1 / size) ** 1.6 * (frequency < detail / size)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * power, s=(size, size))
    return (field - field.mean()) / field.std()


def land_cover(rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """Make classes 1 to 4 `[size, size]`: lakes, forest on hills, and square fields, some of them bare."""
    height, wet = smooth(rng, size, 40), smooth(rng, size, 24)
    fields = np.kron(rng.random((size // 32, size // 32)), np.ones((32, 32)))
    cover = np.where(fields > 0.72, 4, 3).astype(np.uint8)
    cover[height > 0.25] = 2
    cover[wet < -0.9] = 1
    return cover


def pixels(rng: np.random.Generator, cover: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Make bands `[4, H, W]` for a land cover `[H, W]`: spectra, texture, light on slopes, sensor noise."""
    size = cover.shape[0]
    base = SPECTRA[cover - 1].transpose(2, 0, 1).astype(np.float64)
    light = 1 + 0.08 * np.gradient(smooth(rng, size, 60))[0] * 30
    texture = 1 + 0.15 * smooth(rng, size, 200) + 0.04 * np.stack([smooth(rng, size, 200) for _ in BANDS])
    noise = rng.normal(0, 45, base.shape)
    return np.clip(base * light.clip(0.6, 1.5) * texture + noise, 1, 15000).astype(np.uint16)


def make_scenes(folder: Path) -> tuple[list[str], str]:
    """Write the scenes if they do not exist; return image files and label file, relative to `folder`."""
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
            scene = bands[:, r * SCENE : (r + 1) * SCENE, c * SCENE : (c + 1) * SCENE]
            for i, band in enumerate(BANDS):
                name = folder / f"T33_{r}{c}_20230815_{band}.tif"
                make_cog(name, scene[i], transform=corner, crs=CRS, nodata=0, blocksize=256)
    corner = Affine(PIXEL, 0, WEST, 0, -PIXEL, NORTH)
    make_cog(folder / label, cover, transform=corner, crs=CRS, nodata=0, blocksize=256)
    (folder / "complete").touch()
    return images, label


@contextmanager
def served(folder: Path) -> Iterator[tuple[list[str], str]]:
    """Write the scenes if they do not exist and serve them on loopback; yield image URLs and label URL."""
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
    images, label = make_scenes(Path(sys.argv[1]))
    print(f"{len(images)} images and {label} in {sys.argv[1]}")
