"""What all measurements share: files, server, Collections, chips, and rounds that measure every reader once."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import trial
from limit import Chip, TileIndex
from readers import Row, Work, as_json
from report import Section
from scenes import BANDS, RES, Layout
from server import Server

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection

SIZE = 256
"""Rows and columns of a chip."""
LIMIT_BATCHES = 4
"""Batches that the limit keeps in flight in each process."""


def log(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """One run of the program."""

    args: argparse.Namespace
    """The command line."""
    layout: Layout
    """Layout of the files."""
    folder: Path
    """Folder of the files."""
    scratch: Path
    """Temporary folder for Collections and lists of chips."""
    server: Server
    """Serves `folder`."""
    _chips: list[Any] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        """Number of times that everything is measured."""
        return int(self.args.rounds)

    @property
    def batch(self) -> int:
        """Chips in a batch."""
        return int(self.args.batch)

    @property
    def locality(self) -> str:
        """Locality of the sampler, `blocks x tiles`: from the command line, else the library's default."""
        default = rm.Locality()
        return self.args.locality or f"{default.blocks}x{default.tiles}"

    def base(self, delay: int | None) -> str:
        """Return the URL of the files behind a delay in ms; None = the folder itself."""
        return str(self.folder.resolve()) if delay is None else self.server.url(delay)

    def collection(self, delay: int | None, kind: str = "scenes") -> str:
        """Return the path of the Collection of the "scenes" or the "series" behind a delay; build it if needed."""
        path = self.scratch / f"{kind}_{delay}.parquet"
        if not path.exists():
            if kind == "scenes":
                names = [name for bands in self.layout.files() for name in bands]
            else:
                names = [self.layout.series_name(date) for date in range(self.args.dates)]
            hrefs = [f"{self.base(delay)}/{name}" for name in names]
            rm.build(hrefs, str(path), bands=list(BANDS) if kind == "scenes" else ["B1"], progress=False)
        return str(path)

    def chips(self, count: int) -> list[tuple[int, int, int]]:
        """Return (scene, row, column) of the first chips of an epoch, as the library's uniform sampler draws them."""
        if len(self._chips) < count:
            dataset = rm.RasteretDataset(self.collection(None), list(BANDS))
            sampler = rm.RandomAOISampler(dataset, SIZE, count, seed=self.args.seed)
            self._chips = [self.locate(dataset, aoi) for aoi in sampler]
        return self._chips[:count]

    def locate(self, dataset: Any, aoi: Any) -> tuple[int, int, int]:
        """Return scene, row and column of an AOI's chip."""
        xmin, _, _, ymax = dataset.chip_grid(aoi).bounds
        step = self.layout.corner(1)[0] - self.layout.corner(0)[0]
        scene = int((xmin - self.layout.corner(0)[0]) // step)
        x, y = self.layout.corner(scene)
        return scene, round((y - ymax) / RES), round((xmin - x) / RES)

    def work(self, delay: int | None, chips: int) -> Work:
        """Return the task for the readers: the first chips of the epoch, read behind a delay."""
        path = self.scratch / f"chips_{chips}.npy"
        if not path.exists():
            np.save(path, np.array(self.chips(chips), np.int64))
        return Work(
            base=self.base(delay),
            collection=self.collection(delay),
            chips=str(path),
            layout=asdict(self.layout),
            batch=self.batch,
            size=SIZE,
            seed=self.args.seed,
            epoch=max(self.args.epoch, chips),
        )

    def requests(self, batches: int) -> list[list[Any]]:
        """Return the requests that the limit makes for the first batches."""
        index, files = TileIndex(str(self.folder), SIZE), self.layout.files()
        chips = [Chip(files[scene], row, col) for scene, row, col in self.chips(batches * self.batch)]
        return [index.requests(chips[i : i + self.batch]) for i in range(0, len(chips), self.batch)]

    def rate(self, row: Row, delay: int | None, longer: int = 1) -> float:
        """Measure chips per second of a row in a fresh process, over `longer` times the usual number of batches."""
        warm, batches = int(self.args.warm), self.batches(row, delay) * longer
        total = warm + batches + int(self.args.tail)
        if row.reader == "limit":
            plan, processes = self.requests(total), row.options["processes"]
            limit = {"base": self.base(delay), "batches": plan, "processes": processes, "ahead": LIMIT_BATCHES}
            times = trial.run("limit:limit_times", limit)
        else:
            task = {"work": as_json(self.work(delay, total * self.batch)), "reader": row.reader, "options": row.options}
            times = trial.run("readers:read_times", task | {"batches": warm + batches}, env=row.env)
        return trial.rate(times, warm, batches, self.batch)

    def batches(self, row: Row, delay: int | None) -> int:
        """Return how many batches are timed: few for a slow reader, and fewer with a long delay."""
        if not row.slow:
            return int(self.args.batches)
        return int(self.args.slow_batches) // (2 if (delay or 0) >= 100 else 1)

    def check(self, rows: Sequence[Row], delay: int | None) -> None:
        """Compare the pixels of some batches with those that GDAL reads, and exit if they differ."""
        count = int(self.args.compare)
        work = as_json(self.work(delay, (count + 4) * self.batch))
        reference = Row(label="rasterio", reader="rasterio", options={"threads": 2})
        expected = None
        for row in [reference, *(row for row in rows if row.reader != "limit" and not row.options.get("locality"))]:
            task = {"work": work, "reader": row.reader, "options": row.options, "batches": count}
            digests = trial.run("readers:read_digests", task, env=row.env)
            expected = expected or digests
            if digests != expected:
                raise SystemExit(f"{row.label!r} must read the same pixels as GDAL: digests {expected}, got {digests}.")
            log(f"  {count} batches of {row.label}: pixels equal GDAL's")

    def available(self, rows: Sequence[Row], section: Section) -> list[Row]:
        """Return the rows that can be measured; note the others in the section."""
        kept = []
        for row in rows:
            reason = row.missing()
            if not any(fnmatch(row.label, pattern) for pattern in self.args.only):
                reason = "not in --only"
            if reason is None:
                kept.append(row)
            else:
                section.notes.append(f"skipped: {row.label} ({reason})")
                log(section.notes[-1])
        return kept

    def paired(self, rows: Sequence[Row], measure: Callable[[Row], float]) -> defaultdict[str, list[float]]:
        """Measure all rows once per round, each round in another order; labels that are not in `rows` map to []."""
        values: defaultdict[str, list[float]] = defaultdict(list)
        for turn in range(self.rounds):
            for i in range(len(rows)):
                row = rows[(i + turn) % len(rows)]
                values[row.label].append(measure(row))
                log(f"  round {turn + 1}, {row.label}: {values[row.label][-1]:.3g}")
        return values


def dataset_of(collection: str, bands: Sequence[str]) -> Any:
    """Return the library's dataset over a Collection."""
    return rm.RasteretDataset(Collection.open(collection), list(bands))
