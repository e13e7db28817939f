"""`build`: any source of rasters to a Collection."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.write import check_target, write_collection
from rasteret_ml.errors import DataError, UnknownBandError, UsageError
from rasteret_ml.storage.limits import FetchLimits
from rasteret_ml.storage.open import SignHook, SigningReader, open_reader
from rasteret_ml.storage.reader import as_reader
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.collection.build.assembly import Assembly
from rasteret_ml.collection.build.draft import RecordDraft
from rasteret_ml.collection.build.files import drafts_from_files, expand_paths
from rasteret_ml.collection.build.headers import read_headers
from rasteret_ml.collection.build.draft import BuildReport
from rasteret_ml.collection.build.row_groups import RowGroup, groups_to_table
from rasteret_ml.collection.build.temp_store import TempStore
from rasteret_ml.collection.build.stac import draft_from_item, is_stac, items_from
from rasteret_ml.collection.build.tables import as_arrow_table, drafts_from_table, is_table
from rasteret_ml.raster.worker_loop import relaxed_gc
from rasteret_ml.telemetry import Meter

__all__ = ["build"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


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
        source: GeoTIFF paths, globs, folders, URLs, a `.txt` list of these, or a list of any; a GeoDataFrame,
            Arrow table or Parquet path with an address column per band; STAC items (mappings, pystac objects,
            item collections, JSON paths) or a list of them.
        out: Where to write: `name.parquet` is one file, any other name a hive-partitioned folder. Written
            whole or not at all.
        bands: For files, band names (see `drafts_from_files`); for tables, band to column or (column, index);
            for STAC, the bands or asset keys to take. None = all that there are.
        columns: For tables: which columns are `id`, `datetime` and `geometry`.
        datetime: For files: "filename" reads a date from the name, None leaves records undated.
        data_source: Band registry to note in the Collection; default the STAC items' collection.
        crs: CRS of files that declare none (any form that pyproj takes).
        sidecars: Look for overviews (`.ovr`) and masks (`.msk`) beside files that have none inside: up to three
            requests a file. None = beside local files only.
        strict: Raise on the first file that cannot be read, instead of listing it in the report.
        sign: Called with each href just before it is read; the Collection keeps the unsigned one.
        backend: Something else to read from (see `as_reader`).
        limits: Timeouts, retries and connections; default as everywhere, with a connection for each header in
            flight.
        max_concurrent: Headers in flight.
        progress: Progress bar; default in a terminal only.

    Returns:
        The Collection, opened from `out`; `Collection.report` is the `BuildReport`.

    Raises:
        UsageError: nothing to build from, or an argument that does not fit it.
        DataError: no file at all could be read; the message lists the reasons.
    """
    if max_concurrent < 1:
        raise UsageError(f"max_concurrent must be at least 1, not {max_concurrent}.")
    check_target(out)
    drafts = _drafts(source, bands, columns, datetime, data_source)
    fallback = None if crs is None else crs_text(crs)
    if fallback is not None:
        drafts = [draft if draft.crs is not None else replace(draft, crs=fallback) for draft in drafts]
    if not drafts:
        raise UsageError("There is nothing to build from: the source is empty.")
    for band in bands if bands is not None else ():
        if all(band in dict(draft.problems) for draft in drafts):
            raise UnknownBandError(f"No record has band {band!r}: {dict(drafts[0].problems)[band]}.")
    beside = False if sidecars is None and backend is not None else sidecars
    meter, began = Meter(), time.perf_counter()
    bar = sys.stderr.isatty() if progress is None else progress
    with TempStore(out) as spill, relaxed_gc():
        assembly = Assembly(drafts, spill, strict=strict)
        own = FetchLimits(connections=max_concurrent) if limits is None else limits
        reader = as_reader(backend) if backend is not None else open_reader(own, meter)
        signed = reader if sign is None else SigningReader(reader, sign)

        async def headers() -> list[RowGroup]:
            try:
                await read_headers(
                    signed, assembly.hrefs, assembly.take, sidecars=beside, max_concurrent=max_concurrent, progress=bar
                )
                return await assembly.finish()
            finally:
                if backend is None:
                    await reader.aclose()

        groups = _run(headers())
        report = BuildReport(
            records=sum(len(group.drafts) for group in groups),
            files=len(assembly.hrefs),
            requests=meter.snapshot().requests,
            seconds=time.perf_counter() - began,
            failures=tuple(failure for group in groups for failure in group.failures),
        )
        if not report.records:
            shown = "\n".join(f"  {failure}" for failure in report.failures[:10])
            raise DataError(f"None of the {report.files} files could be used:\n{shown}")
        for failure in report.failures:
            _log.warning("left out: %s", failure)
        registry = data_source if data_source is not None else next((d.collection for d in drafts if d.collection), "")
        table = groups_to_table(groups, name=os.path.basename(os.fspath(out)), data_source=registry)
        return Collection.open(write_collection(table, out), report=report)


def _drafts(
    source: Any,
    bands: Sequence[str] | Mapping[str, Any] | None,
    columns: Mapping[str, str] | None,
    datetime: str | None,
    data_source: str | None,
) -> list[RecordDraft]:
    if isinstance(bands, str):
        raise UsageError(f"bands= is a list of names, not the text {bands!r}.")
    if is_table(source):
        return drafts_from_table(as_arrow_table(source), bands, columns or {}, data_source)
    parts = list(source) if isinstance(source, (list, tuple, set, frozenset)) else [source]
    parts = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in parts]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == 1 == len(parts) and texts[0].endswith((".parquet", ".geoparquet")):
        return drafts_from_table(as_arrow_table(texts[0]), bands, columns or {}, data_source)
    if columns:
        raise UsageError("columns= is for tables; these are files or STAC items.")
    if isinstance(bands, Mapping):
        raise UsageError("bands= maps names to columns for tables only; for files and STAC items give a list of names.")
    names = None if bands is None else list(bands)
    expanded = expand_paths([t for t in texts if not t.endswith((".json", ".geojson"))])
    json_paths = [t for t in texts if t.endswith((".json", ".geojson"))]
    json_paths += [t for t in expanded if t.endswith((".json", ".geojson"))]
    tiffs = [t for t in expanded if not t.endswith((".json", ".geojson"))]
    items = [p for p in parts if not isinstance(p, str)]
    for item in items:
        if not is_stac(item):
            raise UsageError(f"A {type(item).__name__} is neither a path, a table nor a STAC item.")
    drafts = [
        draft_from_item(item, base, names, data_source)
        for origin in [*items, *expand_paths(json_paths)]
        for item, base in items_from(origin)
    ]
    return drafts + drafts_from_files(tiffs, names, datetime)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run to the end, also where a loop is running already (Jupyter): then on a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[_T | BaseException] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def target() -> None:
        try:
            outcome.append(loop.run_until_complete(task))
        except BaseException as error:
            outcome.append(error)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=target, name="rasteret-build", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # in slices: an interrupt is noticed between them
    except BaseException:
        loop.call_soon_threadsafe(task.cancel)
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
