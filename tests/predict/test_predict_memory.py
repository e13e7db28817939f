"""Memory is bounded by the window and not by the map."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio

import rasteret_ml as rm
from rasteret_ml.testing import make_cog

WINDOW, PLANES, MIB = 256, 16, 1024 * 1024
SMALL, LARGE = (300, 300), (1840, 1840)

SCRIPT = """
import os, resource, sys
import torch
import rasteret_ml as rm

torch.set_num_threads(1)
rm.RasteretDataset, rm.DataLoader, rm.GridAOISampler, rm.predict_map, rm.Collection  # imported once
folder = sys.argv[1]

def run(name, output):
    dataset = rm.RasteretDataset(rm.Collection.open(f"{folder}/{name}.parquet"), ["B1"])
    loader = rm.DataLoader(dataset, batch_size=1, sampler=rm.GridAOISampler(dataset, 256, 224), lookahead=1)
    weights = torch.linspace(-1, 1, 16)[:, None, None]
    rm.predict_map(
        lambda image: image * weights, loader, f"{folder}/{name}-{output}.tif", output=output, memory_bytes=16 * 2**20
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for output in ("classes", "scores"):
    for name in ("small", "large"):
        if not os.fork():
            print(repr((output, name, run(name, output) * 1024)), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


@pytest.mark.slow
def test_a_map_of_fifty_windows_takes_no_more_memory_than_one_of_two(tmp_path):
    """Peak resident memory of a process, for classes and scores; as a whole it would be 230 MiB."""
    assert LARGE[0] * LARGE[1] > 50 * WINDOW**2 > 25 * SMALL[0] * SMALL[1]
    for name, shape in (("small", SMALL), ("large", LARGE)):
        stripes = np.broadcast_to((np.arange(shape[1]) // 10 % 2 + 1).astype(np.uint8), shape)
        make_cog(tmp_path / f"{name}_20230815.tif", np.ascontiguousarray(stripes), nodata=0)
        rm.build(str(tmp_path / f"{name}_20230815.tif"), tmp_path / f"{name}.parquet")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path],
        env=os.environ | {"PYTHONPATH": str(Path(rm.__file__).parents[1]), "MALLOC_ARENA_MAX": "2"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    peak = {(output, name): size for output, name, size in map(ast.literal_eval, done.stdout.splitlines())}
    whole = (PLANES + 1) * 4 * LARGE[0] * LARGE[1]
    for output in ("classes", "scores"):
        grown = peak[output, "large"] - peak[output, "small"]
        # What is held is bounded (16 MiB of blocks, GDAL's cache of 32, its COG writer's strips of overviews), but the
        # small map does not fill it: about 80 MiB more with 16 planes, while whole maps differ by 230.
        assert grown < whole / 2, {k: f"{v / MIB:.0f} MiB" for k, v in peak.items()}
        with rasterio.open(tmp_path / f"large-{output}.tif") as file:
            last = file.read(file.count)
            np.testing.assert_allclose(last, 15 if output == "classes" else stripes, rtol=1e-6)
