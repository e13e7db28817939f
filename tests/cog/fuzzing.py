"""Mutated TIFFs through header, plan and execution: pixels or a DataError, quickly and in little memory.

By hand, for long: `PYTHONPATH=tests:tests/cog python tests/cog/fuzzing.py --minutes 10 SEED_FOLDER …`. Each finding is
written to `--keep`, and the exit status tells whether there were any.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rasteret_ml.collection.build.headers import read_header
from rasteret_ml.errors import DataError, ReadError
from rasteret_ml.geo.grid import Window
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import execute
from rasteret_ml.raster.plan import plan_chip
from rasteret_ml.raster.source import BandSource
from rasteret_ml.testing import MemoryReader

SECONDS = 2.0
"""A file that takes longer is a finding (by hand only: no test asserts a time)."""
MEMORY = 500 * 1024 * 1024
"""More memory than this, beyond what the process used before, is a finding."""
_NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 64, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946, 34712, 34887, 34925, 50000, 50001, 50002)


def load_seeds(folders: Sequence[Path], largest: int = 100_000) -> list[bytes]:
    """The small files of some folders."""
    paths = sorted(path for folder in folders for path in folder.iterdir() if path.suffix.lower() in (".tif", ".tiff"))
    return [content for path in paths if len(content := path.read_bytes()) <= largest]


def mutate(seed: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """A few random edits, half of them in the first directory's entries."""
    content = bytearray(seed)
    for _ in range(int(rng.integers(1, 6))):
        if len(content) < 16:
            break
        kind = int(rng.integers(0, 7))
        if kind == 0:
            content[int(rng.integers(0, len(content)))] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            start = int(rng.integers(0, len(content)))
            size = int(rng.integers(1, 9))
            content[start : start + size] = rng.bytes(size)
        elif kind == 2:
            del content[int(rng.integers(8, len(content))) :]
        elif kind == 3:
            other = others[int(rng.integers(0, len(others)))]
            start, size = int(rng.integers(0, len(content))), int(rng.integers(1, 200))
            place = int(rng.integers(0, max(1, len(other) - size)))
            content[start : start + size] = other[place : place + size]
        else:
            _edit_entry(content, rng)
    return bytes(content)


def _edit_entry(content: bytearray, rng: np.random.Generator) -> None:
    """Another type, count or value for one tag of the first directory."""
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, start)
        size, first = (20, start + 8) if big else (12, start + 2)
        entry = first + size * int(rng.integers(0, max(1, min(count, 60))))
        (code,) = struct.unpack_from(order + "H", content, entry)
        number = int(rng.choice(_COMPRESSIONS if code == 259 else np.array(_NUMBERS, np.uint64)))
        field = int(rng.integers(0, 4))
        if field == 0:
            struct.pack_into(order + "H", content, entry + 2, int(rng.integers(0, 19)))
        elif field == 1:
            struct.pack_into(order + ("Q" if big else "I"), content, entry + 4, number % 2 ** (64 if big else 32))
        elif field == 2:
            struct.pack_into(order + "H", content, entry + (12 if big else 8), number % 65536)
        else:
            wide = "Q" if big else "I"
            struct.pack_into(order + wide, content, entry + (12 if big else 8), number % 2 ** (64 if big else 32))
    except (struct.error, OverflowError):
        return


def read_some(content: bytes) -> str:
    """Read the corners of the first and last band at every level: "read", or the name of our error."""

    async def work() -> None:
        reader = MemoryReader({"fuzz.tif": content})
        opened = await read_header(reader, "fuzz.tif")
        plans = []
        for index in {0, opened.header.count - 1}:
            metadata = opened.band(index)
            chunky = metadata.planar_configuration == 1 and metadata.samples_per_pixel > 1
            source = BandSource(
                record="fuzz",
                band=str(index),
                href="fuzz.tif",
                metadata=metadata,
                sample=index if chunky else 0,
                nodata=metadata.nodata,
            )
            for level in metadata.levels[:3]:
                height, width = level.grid.shape
                for row, col in ((0, 0), (height - 50, width - 50)):
                    window = Window(row=row, col=col, height=64, width=64)
                    plans.append(plan_chip([source], level.grid.window(window), wrap=False))
        for plan in plans:
            await execute([plan], Engine(reader=reader))

    try:
        asyncio.run(work())
    except (DataError, ReadError) as error:
        return type(error).__name__
    return "read"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz for some minutes; print a count of outcomes and each finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("findings"))
    chosen = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    seeds, rng = load_seeds(chosen.folders), np.random.default_rng(chosen.seed)
    outcomes: dict[str, int] = {}
    findings, held = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stop = time.monotonic() + 60 * chosen.minutes
    while time.monotonic() < stop:
        content = mutate(seeds[int(rng.integers(0, len(seeds)))], seeds, rng)
        began = time.monotonic()
        try:
            outcome = read_some(content)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = f"ESCAPED {type(error).__name__}: {traceback.format_exc(limit=-2)}"
        spent, now = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if spent > SECONDS:
            outcome = f"SLOW {spent:.1f} s: {outcome}"
        if (now - held) * 1024 > MEMORY:
            outcome = f"LARGE {(now - held) / 1024:.0f} MiB: {outcome}"
            held = now
        if outcome.startswith(("ESCAPED", "SLOW", "LARGE")):
            chosen.keep.mkdir(exist_ok=True)
            (chosen.keep / f"{findings}.tif").write_bytes(content)
            print(f"{chosen.keep}/{findings}.tif: {outcome}", flush=True)
            findings, outcome = findings + 1, "finding"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(f"{sum(outcomes.values())} files: {outcomes}")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
