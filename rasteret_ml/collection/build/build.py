"""`build`: read the headers of rasters once and write a Collection."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rasteret_ml.collection.build.headers import read_headers
from rasteret_ml.collection.build.read_source import read_source
from rasteret_ml.collection.build.record_rows import BuildFailure, RecordRows, SourceRecord, join_rows
from rasteret_ml.collection.build.table_builder import TableBuilder, TempStore
from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.write import check_output_path, write_collection
from rasteret_ml.errors import DataError, UnknownBandError, UsageError
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.raster.worker_loop import WorkerLoop, relaxed_gc
from rasteret_ml.storage.open import SignHook, SigningReader, open_reader
from rasteret_ml.storage.reader import FetchLimits, as_reader
from rasteret_ml.telemetry import Meter

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """Counts and failures of a build."""

    records: int  #: Rows written.
    files: int  #: Distinct files of the source.
    requests: int  #: Requests made for headers.
    seconds: float  #: Wall time of reading headers.
    failures: tuple[BuildFailure, ...]  #: Bands and files left out; a record without any band left has no row.

    def __str__(self) -> str:
        counts = f"{self.records} records from {self.files} files ({self.requests} requests, {self.seconds:.1f} s)"
        return "\n".join([f"{counts}, {len(self.failures)} failures", *(f"  {failure}" for failure in self.failures)])


def build(
    source: Any,
    out: str | os.PathLike[str],
    *,
    bands: Sequence[str] | Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    datetime: str | None = "filename",
    data_source: str | None = None,
    crs: Any = None,
    sidecars: bool | None = None,
    strict: bool = False,
    sign: SignHook | None = None,
    backend: Any = None,
    limits: FetchLimits | None = None,
    max_concurrent: int = 256,
    progress: bool | None = None,
) -> Collection:
    """Read headers once and write a Collection.

    Args:
        source: GeoTIFF paths, globs, folders, URLs, a `.txt` list of these, or a list of any; a GeoDataFrame, Arrow
            table or Parquet path with an href column per band; STAC items (mappings, pystac objects, item collections,
            JSON paths) or a list of them.
        out: Where to write: `name.parquet` is one file, any other name a hive-partitioned folder. Written completely
            or not at all.
        bands: For files, band names (see `records_from_files`); for tables, band to column or (column, index); for
            STAC, band codes or asset keys. None = all bands.
        columns: For tables: names of the columns `id`, `datetime` and `geometry`.
        datetime: For files: "filename" reads a date from the name, None leaves records undated.
        data_source: Band registry to store in the Collection; default the STAC items' collection.
        crs: CRS of files that declare none (any form that pyproj takes).
        sidecars: Look for overviews (`.ovr`) and masks (`.msk`) beside files that have none inside: up to three
            requests per file. None = only beside local files.
        strict: Raise on the first file that cannot be read, instead of listing it in the report.
        sign: Called with each href just before it is read; the Collection keeps the unsigned one.
        backend: Object to read from instead of the href's own scheme (see `as_reader`).
        limits: Timeouts, retries and connections; default those of `FetchLimits`, with a connection per header in
            flight.
        max_concurrent: Headers in flight.
        progress: Show a progress bar; default only in a terminal.

    Returns:
        The Collection, opened from `out`; its `report` is the `BuildReport`.

    Raises:
        UsageError: There is nothing to build from, or an argument does not fit the source.
        DataError: No file could be read; the message lists the reasons.

    Example:
        >>> scenes = build("scenes/*.tif", "scenes.parquet")  # doctest: +SKIP
        >>> print(scenes.report)  # doctest: +SKIP
    """
    if max_concurrent < 1:
        raise UsageError(f"max_concurrent must be >= 1, got {max_concurrent}.")
    check_output_path(out)
    records = read_source(source, bands, columns, datetime, data_source)
    if crs is not None:
        fallback = crs_text(crs)
        records = [record if record.crs is not None else replace(record, crs=fallback) for record in records]
    _check_records(records, bands or ())
    meter, start = Meter(), time.perf_counter()
    with TempStore(out) as store, relaxed_gc():
        builder = TableBuilder(records, store, strict=strict)
        if backend is not None:
            reader = as_reader(backend)
        else:
            reader = open_reader(FetchLimits(connections=max_concurrent) if limits is None else limits, meter)

        async def read_all() -> list[RecordRows]:
            try:
                await read_headers(
                    reader if sign is None else SigningReader(reader, sign),
                    builder.hrefs,
                    builder.add,
                    sidecars=False if sidecars is None and backend is not None else sidecars,
                    max_concurrent=max_concurrent,
                    progress=sys.stderr.isatty() if progress is None else progress,
                )
                return await builder.finish()
            finally:
                if backend is None:
                    await reader.aclose()

        groups = _run(read_all())
        report = BuildReport(
            records=sum(len(group.records) for group in groups),
            files=len(builder.hrefs),
            requests=meter.snapshot().requests,
            seconds=time.perf_counter() - start,
            failures=tuple(failure for group in groups for failure in group.failures),
        )
        if not report.records:
            reasons = "\n".join(f"  {failure}" for failure in report.failures[:10])
            raise DataError(f"None of the {report.files} files could be read:\n{reasons}")
        for failure in report.failures:
            _log.warning("left out: %s", failure)
        if data_source is None:
            data_source = next((record.collection for record in records if record.collection), "")
        table = join_rows(groups, name=os.path.basename(os.fspath(out)), data_source=data_source)
        collection = Collection.open(write_collection(table, out))
        collection.report = report
        return collection


def _check_records(records: Sequence[SourceRecord], bands: Iterable[str]) -> None:
    if not records:
        raise UsageError("There is nothing to build from: the source is empty; check the path or the search.")
    for band in bands:
        if all(band in dict(record.problems) for record in records):
            raise UnknownBandError(f"No record has band {band!r}: {dict(records[0].problems)[band]}.")


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end; on another thread if an event loop is already running here (Jupyter)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loop = WorkerLoop(threads=1)
    try:
        return loop.wait(loop.start(work))
    finally:
        loop.close()
