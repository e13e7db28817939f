"""The conformance set through the whole library, from build to chip; GDAL and tifffile are the oracles."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from pixel_oracle import rasters, window_by_rasterio
from rasterio.errors import RasterioError

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.geo.grid import Window
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import execute
from rasteret_ml.storage.open import open_reader
from rasteret_ml.testing import RangeServer

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

MOST_PIXELS = 2**27
"""Larger images are tried by window alone."""
WINDOWS = 20

REFUSED = {
    "compression 3 (CCITT Group 3)": 6,
    "compression 4 (CCITT Group 4)": 6,
    "compression 6 (old-style JPEG)": 1,
    "compression 32809 (ThunderScan)": 1,
    "compression 34676 (SGI log)": 1,
    "compression 34934 (JPEG XR)": 1,
    "CIELab pixels": 1,
    "YCbCr pixels in separate planes": 1,
    "an image with depth": 1,
    "it starts with a JPEG 2000 file": 3,
    "3 tiles are expected, but the header lists 2 offsets": 1,
}
"""What the library says of the files that it refuses, and how many there are of each."""

RAW = ("cmyk", "flower-separated")
"""GDAL shows 8-bit CMYK as RGBA; here, as in tifffile, it is what the file holds."""

CUT_SHORT = {"rouault+gdal__autotest__gcore__data__strip_larger_than_2GB_header.tif"}
"""Headers without their pixels."""


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """GDAL's and tifffile's remarks on odd files are expected."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """The conformance set."""
    path: Path = request.getfixturevalue("shared_data") / "conformance"
    return path


@pytest.fixture(scope="module")
def collection(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """All of it as one Collection, as it lies on disk."""
    files = sorted(str(path) for path in folder.iterdir() if path.suffix != ".json")
    return build(files, tmp_path_factory.mktemp("conformance") / "all.parquet", datetime=None, progress=False)


Record = tuple[str, RasterAccessor, list[str]]
"""Path, record and its bands in the order of the file."""


@pytest.fixture(scope="module")
def records(collection: Collection) -> list[Record]:
    """Every record of it."""
    return _records(collection)


@dataclass
class Comparison:
    """What was compared, and what was not equal."""

    wrong: dict[str, str] = field(default_factory=dict)
    done: int = 0

    def note(self, name: str, problem: str | None) -> None:
        self.done += 1
        if problem is not None:
            self.wrong.setdefault(name, problem)


def _records(collection: Collection) -> list[Record]:
    found = []
    for record in rasters(collection):
        assets = {name: asset for name, asset in record.assets.items() if asset is not None}
        bands = sorted(record.available_bands, key=lambda name: assets[name]["band_index"] or 0)
        found.append((str(assets[bands[0]]["href"]), record, bands))
    return found


def _read(record: RasterAccessor, bands: Sequence[str], windows: Sequence[Window], level: int = 0) -> list[Chip]:
    grid = record.grid(bands[0], level)
    plans = [record.plan(grid.window(window), bands, wrap=False, level=level) for window in windows]

    async def work() -> list[Chip]:
        async with open_reader() as reader:
            return list((await execute(plans, Engine(reader=reader))).chips)

    return asyncio.run(work())


def _same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.array_equal(ours, theirs, equal_nan=theirs.dtype.kind in "fc"))


def _windows(shape: tuple[int, int], rng: np.random.Generator) -> list[Window]:
    """Random windows, some over the edges."""
    found = []
    for _ in range(WINDOWS):
        height, width = (int(rng.integers(1, max(2, min(side, 300) + 1))) for side in shape)
        row, col = (
            int(rng.integers(-size // 2, side - size // 2)) for size, side in zip((height, width), shape, strict=True)
        )
        found.append(Window(row=row, col=col, height=height, width=width))
    return found


def _turbo(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A JPEG page of this height and width, by libjpeg-turbo."""
    with tifffile.TiffFile(path) as tiff:
        page = next(p for p in tiff.pages if p.shape[:2] == tuple(shape) and not p.is_mask)
        return np.moveaxis(page.asarray(), -1, 0)


def _problem(
    name: str, chip: Chip, data: np.ndarray, masks: np.ndarray, record: RasterAccessor, level: int = 0
) -> str | None:
    """How a full chip differs from the oracle's pixels and masks."""
    source = record.source(chip.bands[0])
    valid = masks != 0
    if data.dtype.kind in "fc":
        valid = valid & ~np.isnan(data)
    ours = chip.data
    lerc = source.metadata.compression == 34887
    differing = ~chip.valid if lerc else np.zeros(ours.shape, bool)  # LERC: what stands in an invalid pixel is free
    if source.metadata.photometric == 6:
        if level == 0 and np.quantile(np.abs(ours.astype(int) - data), 0.999) > 30:
            return "YCbCr differs by more than 30 levels"
        if source.metadata.compression == 7 and not _same(_turbo(name, ours.shape[1:]), ours):
            return "JPEG is not libjpeg-turbo's"
    if source.metadata.photometric != 6 and not _same(np.where(differing, 0, ours), np.where(differing, 0, data)):
        return f"{np.count_nonzero(ours != data)} of {data.size} pixels differ ({ours.dtype}, {data.dtype})"
    if not np.array_equal(chip.valid_all, np.logical_and.reduce(list(valid))):
        return "the combined validity is not the AND of the bands"
    if not np.array_equal(chip.valid, valid):
        return f"validity differs at {np.count_nonzero(chip.valid != valid)} of {valid.size}"
    return None


def _oracle(path: str, level: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """Pixels and masks `[C, H, W]` by GDAL, or by tifffile where GDAL's wheel lacks the codec."""
    try:
        with rasterio.open(path, **({"overview_level": level - 1} if level else {})) as source:
            if source.width * source.height > MOST_PIXELS:
                return None
            data, masks = source.read(), source.read_masks()
    except RasterioError:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            data = np.atleast_3d(page.asarray())
            data = data if page.planarconfig == 2 and data.shape[-1] != 1 else np.moveaxis(data, -1, 0)
        masks = np.full(data.shape, 255, np.uint8)
        if len(data) in (2, 4) and page.extrasamples in ((1,), (2,)):
            masks[:-1] = data[-1]
    if any(word in path for word in RAW) and data.dtype == np.uint8:
        with tifffile.TiffFile(path) as tiff:
            data = tiff.pages[0].asarray()
        data = data if data.shape[0] == 4 else np.moveaxis(data, -1, 0)
        masks = np.full(data.shape, 255, np.uint8)
    return data, masks


@pytest.mark.slow
def test_what_is_refused_is_refused_by_name(collection: Collection) -> None:
    """Each of the files that are not read says why, and there are no more of them than are known."""
    report = collection.report
    assert report is not None
    told = {Path(failure.href).name: str(failure.error) for failure in report.failures}
    unknown = {name: why for name, why in told.items() if not any(reason in why for reason in REFUSED)}
    assert unknown == {}
    counts = {reason: sum(reason in why for why in told.values()) for reason in REFUSED}
    assert counts == REFUSED
    assert all(name in why for name, why in told.items())
    assert len(collection) == 650 - len(told)


@pytest.mark.slow
def test_every_file_equals_the_oracle_whole_and_by_window(records: list[Record]) -> None:
    """Pixels and validity, all bands, at full resolution; 20 random windows each equal the same crop."""
    compared = _compared(records)
    assert compared.wrong == {}
    assert compared.done > 600 * (1 + WINDOWS)


def test_a_sample_of_the_files_equals_the_oracle(folder: Path, tmp_path: Path) -> None:
    """One small file in twenty, as above."""
    files = sorted(path for path in folder.glob("*.tif*") if path.stat().st_size < 1_000_000)
    sample = build([str(path) for path in files[::20]], tmp_path / "sample.parquet", datetime=None, progress=False)
    compared = _compared(_records(sample))
    assert compared.wrong == {}
    assert compared.done > 25 * (1 + WINDOWS)


def _compared(records: list[Record]) -> Comparison:
    """Each record's whole image and random windows of it against the oracle."""
    compared, rng = Comparison(), np.random.default_rng(0)
    for path, record, bands in records:
        name = Path(path).name
        if name in CUT_SHORT:
            continue
        expected = _oracle(path)
        if expected is None:
            compared.note(name, _window_problem(path, record, bands, rng))
            continue
        shape = expected[0].shape[1:]
        windows = _windows((shape[0], shape[1]), rng)
        whole, *parts = _read(record, bands, [Window(row=0, col=0, height=shape[0], width=shape[1]), *windows])
        compared.note(name, _problem(path, whole, *expected, record))
        for part, window in zip(parts, windows, strict=True):
            compared.note(name, _crop_problem(whole, part, window))
    return compared


def _window_problem(path: str, record: RasterAccessor, bands: list[str], rng: np.random.Generator) -> str | None:
    """How windows of a raster that is too large to hold differ from GDAL's."""
    windows = _windows(record.grid(bands[0]).shape, rng)
    for window, chip in zip(windows, _read(record, bands, windows), strict=True):
        data, valid = window_by_rasterio(path, (window.row, window.col, window.height, window.width))
        if not _same(chip.data, data) or not np.array_equal(chip.valid, valid):
            return f"window {window} differs"
    return None


def _crop_problem(whole: Chip, part: Chip, window: Window) -> str | None:
    extent = Window(row=0, col=0, height=whole.data.shape[1], width=whole.data.shape[2])
    inside = window.intersection(extent)
    if inside is None:
        return "valid outside" if part.valid.any() else None
    here, there = (slice(None), *inside.relative_to(window).slices), (slice(None), *inside.slices)
    outside = np.ones(part.data.shape, bool)
    outside[here] = False
    if not _same(part.data[here], whole.data[there]) or not np.array_equal(part.valid[here], whole.valid[there]):
        return f"window {window} is not the crop"
    return "valid outside" if part.valid[outside].any() else None


@pytest.mark.slow
def test_every_overview_equals_gdal(records: list[Record]) -> None:
    """Pixels and per-band validity of each overview."""
    compared = Comparison()
    for path, record, bands in records:
        with rasterio_or_none(path) as source:
            levels = [] if source is None else source.overviews(1)
        metadata = record.source(bands[0]).metadata
        if source is not None and len(levels) != len(metadata.overviews):
            compared.note(Path(path).name, f"{len(metadata.overviews)} overviews, GDAL {levels}")
            continue
        for level in range(1, len(metadata.levels)):
            expected = _oracle(path, level)
            assert expected is not None
            height, width = expected[0].shape[1:]
            (chip,) = _read(record, bands, [Window(row=0, col=0, height=height, width=width)], level)
            compared.note(f"{Path(path).name}, level {level}", _problem(path, chip, *expected, record, level))
    assert compared.wrong == {}
    assert compared.done >= 50


class rasterio_or_none:  # noqa: N801 - used like `rasterio.open`
    """`rasterio.open`, or None where GDAL cannot."""

    def __init__(self, path: str) -> None:
        try:
            self._source: Any = rasterio.open(path)
        except RasterioError:
            self._source = None

    def __enter__(self) -> Any:
        return self._source

    def __exit__(self, *_: object) -> None:
        if self._source is not None:
            self._source.close()


@pytest.mark.slow
def test_the_same_pixels_over_http(folder: Path, records: list[Record], tmp_path: Path) -> None:
    """A tenth of the files through a range server: byte for byte what local files give."""
    paths = [path for path, _, _ in records if Path(path).name not in CUT_SHORT][::10]
    with RangeServer(folder) as server:
        remote = build([f"{server.url}/{Path(path).name}" for path in paths], tmp_path / "http.parquet", datetime=None)
        over_http = {Path(path).name: (record, bands) for path, record, bands in _records(remote)}
        for path, record, bands in records:
            if Path(path).name not in over_http:
                continue
            other, names = over_http[Path(path).name]
            height, width = record.grid(bands[0]).shape
            window = Window(row=0, col=0, height=min(height, 200), width=min(width, 200))
            (ours,), (theirs,) = _read(record, bands, [window]), _read(other, names, [window])
            assert ours.data.tobytes() == theirs.data.tobytes(), path
            assert np.array_equal(ours.valid, theirs.valid), path
    assert len(over_http) > 50
