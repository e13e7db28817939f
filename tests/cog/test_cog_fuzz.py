"""Random damage to real and generated TIFFs: pixels or our error, for a fixed number of files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from fuzzing import load_seeds, mutate, read_some
from property_settings import share

from rasteret_ml.testing import make_cog

pytestmark = pytest.mark.filterwarnings("ignore")  # GDAL warns about damaged georeferencing

FILES = share(1500)


def _generated(folder: Path) -> list[bytes]:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (3, 90, 70)).astype(np.uint8)
    seeds = []
    for compress in ("none", "deflate", "lzw", "zstd", "lerc", "jpeg", "webp"):
        path = folder / f"{compress}.tif"
        make_cog(path, data, compress=compress, blocksize=64, mask=None if compress == "lerc" else data[0] > 20)
        seeds.append(path.read_bytes())
    for options in ({"compression": "lzma"}, {"compression": "packbits"}, {"bigtiff": True}, {"byteorder": ">"}):
        file = io.BytesIO()
        tifffile.imwrite(file, data.astype(np.uint16), planarconfig="separate", tile=(32, 32), **options)
        seeds.append(file.getvalue())
    return seeds


def test_damaged_files_of_our_own(tmp_path: Path) -> None:
    """Every codec, chunky and planar, with masks and overviews."""
    seeds, rng = _generated(tmp_path), np.random.default_rng(1)
    outcomes = [read_some(mutate(seeds[i % len(seeds)], seeds, rng)) for i in range(FILES)]
    assert set(outcomes) > {"read", "CorruptTiffError", "ReadError"}


def test_damaged_files_of_others(shared_data: Path) -> None:
    """Seeds that broke other readers, and the conformance set."""
    seeds = load_seeds([shared_data / "malformed", shared_data / "conformance"], largest=20_000)
    rng = np.random.default_rng(2)
    outcomes = [read_some(mutate(seeds[int(rng.integers(0, len(seeds)))], seeds, rng)) for _ in range(FILES)]
    assert {"read", "CorruptTiffError", "ReadError", "UnsupportedTiffError"} <= set(outcomes)
