"""Drafts from GeoTIFF paths, globs, folders and URLs."""

from __future__ import annotations

import datetime as dt
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from rasteret_ml.errors import UsageError, redact
from rasteret_ml.storage.urls import is_remote, local_path
from rasteret_ml.collection.build.draft import AssetDraft, RecordDraft

__all__ = ["drafts_from_files", "expand_paths"]

_log = logging.getLogger(__name__)
_TIFF = (".tif", ".tiff", ".gtiff")
_DATE = re.compile(r"(?<!\d)((?:19|20)\d{2})([-_]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")


def expand_paths(paths: Sequence[str]) -> list[str]:
    """Every file meant by paths, globs, folders (all TIFFs below), text files (a path a line) and URLs.

    Raises:
        UsageError: a glob, folder or list without a file.
    """
    found: list[str] = []
    for path in paths:
        if is_remote(path):
            found.append(path)
            continue
        local = local_path(path)
        if local.endswith(".txt"):
            lines = [line.strip() for line in _text(local).splitlines()]
            here = [line for line in lines if line and not line.startswith("#")]
            found.extend(expand_paths(here))
        elif os.path.isdir(local):
            here = sorted(str(p) for p in Path(local).rglob("*") if p.suffix.lower() in _TIFF)
            found.extend(here)
        elif glob.has_magic(local) and not os.path.exists(local):
            here = sorted(glob.glob(local, recursive=True))
            found.extend(here)
        else:
            here = [local]
            found.append(local)
        if not here:
            raise UsageError(f"{redact(path)}: no files found there.")
    return list(dict.fromkeys(p if is_remote(p) else os.path.abspath(local_path(p)) for p in found))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{redact(path)}: cannot be read ({error.strerror}).") from None


def drafts_from_files(hrefs: Sequence[str], bands: Sequence[str] | None, datetime: str | None) -> list[RecordDraft]:
    """Group files into records.

    With `bands`, and every file's name holding one of them as a word (`…_B04.tif`, `B04.tif`), the files that
    differ only in that word (and folder) are one record. Otherwise each file is a record, and `bands` name its
    bands in order.

    Args:
        hrefs: Paths and URLs.
        bands: Band names, or None.
        datetime: "filename" reads a date (YYYYMMDD, YYYY-MM-DD) from the record's id; None = undated.
    """
    if datetime not in ("filename", None):
        raise UsageError(f"datetime= is 'filename' or None for files, not {datetime!r}.")
    tokens = [_band_token(_stem(href), bands) for href in hrefs] if bands else []
    if tokens and all(tokens):
        return _grouped(hrefs, [token for token in tokens if token], datetime)
    if any(tokens):
        odd = [redact(href) for href, token in zip(hrefs, tokens, strict=True) if not token]
        _log.warning(
            "Files are not grouped by band: %d of %d are not named after one (%s%s). Leave them out if the others are "
            "files of one band.",
            len(odd),
            len(hrefs),
            ", ".join(odd[:3]),
            " ..." if len(odd) > 3 else "",
        )
    ids = _unique_ids(hrefs)
    return [
        RecordDraft(
            id=name,
            assets={"*": AssetDraft(href=href)},
            band_names=tuple(bands or ()),
            datetime=_date_in(name) if datetime else None,
        )
        for href, name in zip(hrefs, ids, strict=True)
    ]


def _grouped(hrefs: Sequence[str], tokens: Sequence[tuple[str, str]], datetime: str | None) -> list[RecordDraft]:
    groups: dict[tuple[str, str], dict[str, AssetDraft]] = {}
    for href, (band, rest) in zip(hrefs, tokens, strict=True):
        assets = groups.setdefault((_parent(href), rest), {})
        if band in assets:
            raise UsageError(f"Two files for band {band} of one record: {redact(assets[band].href)}, {redact(href)}.")
        assets[band] = AssetDraft(href=href)
    names = [rest or PurePosixPath(parent).name for parent, rest in groups]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    drafts = []
    for (parent, _), name, assets in zip(groups, names, groups.values(), strict=True):
        unique = f"{PurePosixPath(parent).name}/{name}" if name in repeated else name
        drafts.append(RecordDraft(id=unique, assets=assets, datetime=_date_in(unique) if datetime else None))
    return drafts


def _band_token(stem: str, bands: Sequence[str]) -> tuple[str, str] | None:
    """(band, rest of the stem) where the stem holds a band name as a word, the longest if several."""
    for band in sorted(bands, key=len, reverse=True):
        match = re.search(rf"(?<![A-Za-z0-9]){re.escape(band)}(?![A-Za-z0-9])", stem, re.IGNORECASE)
        if match:
            before, after = stem[: match.start()], stem[match.end() :]
            joint = before[-1:] if before and after else ""
            return band, (before.rstrip("_-. ") + (joint if after.strip("_-. ") else "") + after.strip("_-. ")).strip(
                "_-. "
            )
    return None


def _path(href: str) -> PurePosixPath:
    try:
        return PurePosixPath(unquote(urlsplit(href).path) if is_remote(href) else os.path.abspath(local_path(href)))
    except ValueError as error:
        raise UsageError(f"{redact(href)}: not a URL ({error}).") from None


def _stem(href: str) -> str:
    return _path(href).stem


def _parent(href: str) -> str:
    return str(_path(href).parent)


def _unique_ids(hrefs: Sequence[str]) -> list[str]:
    """Stems; as many parent folders before them as it takes to tell them apart."""
    depth, names = 1, [_stem(h) for h in hrefs]
    while len(set(names)) < len(names) and depth < 16:
        depth += 1
        names = ["/".join((*_path(h).parts[-depth:-1], _stem(h))) for h in hrefs]
    return names


def _date_in(name: str) -> dt.datetime | None:
    for year, _, month, day in _DATE.findall(name):
        try:
            return dt.datetime(int(year), int(month), int(day))
        except ValueError:
            continue
    return None
