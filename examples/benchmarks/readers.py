"""The readers that are compared; all of them yield the same chips in batches `[16, 4, 256, 256]`."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from scenes import BANDS, RES, Layout
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, stack_samples

import rasteret_ml as rm

GDAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "GDAL_NUM_THREADS": "ALL_CPUS",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".tif",
    "CPL_VSIL_CURL_USE_HEAD": "NO",
}
"""GDAL's settings for range requests; the sizes of its caches are set per row."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The chips that a reader reads."""

    base: str
    """URL or folder of the files."""
    collection: str
    """Path of the Collection of these files."""
    chips: str
    """Path of an `.npy` file `[N, 3]`: scene, row and column of each chip."""
    layout: dict[str, Any]
    """The `Layout` of the files."""
    batch: int = 16
    """Chips in a batch."""
    size: int = 256
    """Rows and columns of a chip."""
    seed: int = 0
    """Seed of the order."""
    epoch: int = 8192
    """Chips in an epoch of the library's sampler; other readers read the list of chips to its end."""

    @property
    def remote(self) -> bool:
        """Whether the files are read over HTTP."""
        return self.base.startswith("http")

    def paths(self, prefix: str = "/vsicurl/") -> list[tuple[str, ...]]:
        """Return the GDAL paths of the bands of each scene."""
        prefix = prefix if self.remote else ""
        return [tuple(f"{prefix}{self.base}/{name}" for name in names) for names in Layout(**self.layout).files()]

    def windows(self) -> list[list[tuple[int, int, int]]]:
        """Return (scene, row, column) of the chips, batch by batch."""
        chips = [(int(s), int(r), int(c)) for s, r, c in np.load(self.chips)]
        return [chips[i : i + self.batch] for i in range(0, len(chips), self.batch)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A reader with its settings: a row of a table."""

    label: str
    """Name in the table."""
    reader: str
    """A key of `READERS`, or "limit"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the reader: workers, threads, lookahead …"""
    slow: bool = False
    """Whether to time fewer batches."""
    gdal_cache: int = 16
    """GDAL_CACHEMAX in MB: 16 is enough for a chip; more acts as a tile cache and turns VSI_CACHE on as well."""

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of its process."""
        return GDAL | {"GDAL_CACHEMAX": str(self.gdal_cache), "VSI_CACHE": "TRUE" if self.gdal_cache > 16 else "FALSE"}

    def missing(self) -> str | None:
        """Return why the row cannot be measured; None = it can."""
        if self.reader == "async-geotiff":
            missing = [m for m in ("async_geotiff", "obstore") if importlib.util.find_spec(m) is None]
            return f"not installed: {', '.join(missing)}" if missing else None
        return None


def ours_loader(work: Work, options: dict[str, Any]) -> Any:
    """Return the library's loader; it prefetches batches only with the option `lookahead`."""
    dataset = rm.RasteretDataset(work.collection, list(BANDS), reading={"cache_bytes": options.get("cache_bytes", 0)})
    local = parse_locality(options.get("locality"), work.batch)
    sampler = rm.RandomAOISampler(dataset, work.size, work.epoch, seed=work.seed, locality=local)
    workers = int(options.get("workers", 0))
    extra: dict[str, Any] = {} if options.get("lookahead") else {"lookahead": 0}
    if workers:
        extra["multiprocessing_context"] = options.get("start", "fork")
    return rm.DataLoader(dataset, work.batch, sampler=sampler, num_workers=workers, **extra)


def parse_locality(text: str | None, batch: int) -> rm.Locality | None:
    """Return the locality that `blocks x tiles` or `blocks x tiles x lanes` stands for, as in "16x3"."""
    if text is None:
        return None
    blocks, tiles, lanes = (*map(int, text.split("x")), 1)[:3]
    return rm.Locality(blocks=blocks, tiles=tiles, lanes=lanes, batch_size=batch)


def _ours(work: Work, options: dict[str, Any]) -> Iterator[torch.Tensor]:
    for batch in ours_loader(work, options):
        yield batch["image"]


class _SeparateBands(RasterDataset):  # type: ignore[misc]
    """TorchGeo's dataset with a file for each band."""

    filename_regex = r"S\d+_(?P<date>\d{8})_(?P<band>B\d)\.tif"
    separate_files = True
    all_bands = BANDS


def _torchgeo(work: Work, options: dict[str, Any]) -> Iterator[torch.Tensor]:
    dataset = _SeparateBands([names[0] for names in work.paths()])
    layout, times = Layout(**work.layout), dataset.bounds[2]
    queries = []
    for scene, row, col in (chip for batch in work.windows() for chip in batch):
        x, y = layout.corner(scene)
        left, top, side = x + col * RES, y - row * RES, work.size * RES
        queries.append((slice(left, left + side, RES), slice(top - side, top, RES), slice(times.start, times.stop)))
    workers = int(options.get("workers", 0))
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=work.batch,
        sampler=queries,
        num_workers=workers,
        collate_fn=stack_samples,
        multiprocessing_context="spawn" if workers else None,
    )
    for batch in loader:
        yield batch["image"]


def _rasterio(work: Work, options: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Read in threads, each with its own open files and one chip at a time; two batches in flight."""
    paths, local = work.paths(), threading.local()

    def read(chip: tuple[int, int, int], out: Any) -> None:
        opened = local.__dict__.setdefault("opened", {})
        scene, row, col = chip
        for band, path in enumerate(paths[scene]):
            if path not in opened:
                opened[path] = rasterio.open(path, sharing=False)
            opened[path].read(1, window=Window(col, row, work.size, work.size), out=out[band])

    def submit(chips: list[tuple[int, int, int]]) -> tuple[Any, list[Future[None]]]:
        out = np.empty((len(chips), len(BANDS), work.size, work.size), np.uint16)
        return out, [pool.submit(read, chip, out[i]) for i, chip in enumerate(chips)]

    with ThreadPoolExecutor(int(options["threads"])) as pool:
        batches = iter(work.windows())
        running = deque(submit(chips) for chips in islice(batches, 2))
        while running:
            out, reads = running.popleft()
            for done in reads:
                done.result()
            running.extend(submit(chips) for chips in islice(batches, 1))
            yield torch.from_numpy(out)


def _async_geotiff(work: Work, options: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Read with async-geotiff on obstore: 50 windows at once, four batches in flight."""
    from async_geotiff import GeoTIFF
    from async_geotiff import Window as AsyncWindow
    from obstore.store import HTTPStore, LocalStore

    store = HTTPStore(work.base, client_options={"allow_http": True}) if work.remote else LocalStore(prefix=work.base)
    loop, limit = asyncio.new_event_loop(), asyncio.Semaphore(int(options.get("windows", 50)))

    async def open_all() -> list[list[Any]]:
        names = Layout(**work.layout).files()
        return [await asyncio.gather(*(GeoTIFF.open(n, store=store) for n in bands)) for bands in names]

    async def read(file: Any, chip: tuple[int, int, int], out: Any) -> None:
        window = AsyncWindow(col_off=chip[2], row_off=chip[1], width=work.size, height=work.size)
        async with limit:
            out[:] = (await file.read(window=window)).data[0]

    async def batch(chips: list[tuple[int, int, int]]) -> Any:
        out = np.empty((len(chips), len(BANDS), work.size, work.size), np.uint16)
        jobs = ((i, chip, band) for i, chip in enumerate(chips) for band in range(len(BANDS)))
        await asyncio.gather(*(read(files[chip[0]][band], chip, out[i, band]) for i, chip, band in jobs))
        return out

    files = loop.run_until_complete(open_all())
    batches = iter(work.windows())
    running = deque(loop.create_task(batch(chips)) for chips in islice(batches, 4))
    while running:
        out = loop.run_until_complete(running.popleft())
        running.extend(loop.create_task(batch(chips)) for chips in islice(batches, 1))
        yield torch.from_numpy(out)


READERS: dict[str, Callable[[Work, dict[str, Any]], Iterator[torch.Tensor]]] = {
    "ours": _ours,
    "torchgeo": _torchgeo,
    "rasterio": _rasterio,
    "async-geotiff": _async_geotiff,
}
"""Readers by name; each yields batches of pixels."""


def as_json(work: Work) -> dict[str, Any]:
    """Return the fields of a task, for `trial.run`."""
    return asdict(work)


def read_times(work: dict[str, Any], reader: str, options: dict[str, Any], batches: int) -> list[float]:
    """Trial: return the seconds from the start of the iteration to the arrival of each batch."""
    start, times = time.perf_counter(), []
    for batch in READERS[reader](Work(**work), options):
        _touch(batch)
        times.append(time.perf_counter() - start)
        if len(times) == batches:
            break
    return times


def read_digests(work: dict[str, Any], reader: str, options: dict[str, Any], batches: int) -> list[str]:
    """Trial: return a digest of each batch's pixels, as unsigned 16-bit integers."""
    digests = []
    for batch in READERS[reader](Work(**work), options):
        pixels = batch.numpy()
        exact = pixels.astype(np.uint16)
        if not np.array_equal(exact, pixels):
            raise ValueError(f"{reader} must yield unsigned 16-bit integers, got other values.")
        digests.append(f"{exact.shape} {hashlib.sha256(np.ascontiguousarray(exact).tobytes()).hexdigest()}")
        if len(digests) == batches:
            break
    return digests


def first_batch(work: dict[str, Any], options: dict[str, Any]) -> float:
    """Trial: return the seconds from `iter(loader)` to the first batch of the library's loader."""
    loader = ours_loader(Work(**work), options)
    start = time.perf_counter()
    _touch(next(iter(loader))["image"])
    return time.perf_counter() - start


def _touch(batch: torch.Tensor) -> int:
    """Read some of the pixels, as the cheapest consumer does."""
    return int(cast(Any, batch.numpy())[..., ::16, ::16].astype(np.int64).sum())
