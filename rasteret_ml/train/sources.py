"""Where a datamodule's pixels come from: a Collection that is opened, or files of which one is built, once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.build.read_source import expand_paths
from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.write import check_output_path
from rasteret_ml.errors import CollectionError, UsageError
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.storage.urls import is_remote

__all__ = ["RasterSource", "Rasters", "band_names", "is_plain", "plain", "sources_of"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Rasters = str | list[str] | os.PathLike[str] | Collection
"""A Collection or its path, or GeoTIFFs: a path, glob, folder, URL, `.txt` list, STAC item, or a list of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterSource:
    """Rasters as they were given, and how to come by their Collection."""

    role: Literal["images", "labels"]
    """What they are; labels carry no date, because they are true for every image of their place."""
    given: Rasters
    """What was given."""
    bands: tuple[str, ...] | None
    """Band names, by which files of one band each are grouped; None = one file, one record."""
    folder: Path
    """Where a Collection is built."""

    def open(self) -> Collection:
        """The Collection, built if need be; of several processes at once one builds and the others wait.

        Raises:
            UsageError: nothing is there, or the folder cannot be written to.
            DataError, FetchError: the first file that cannot be read. Build the Collection with `build` to go on
                without it.
        """
        if isinstance(self.given, Collection):
            return self.given
        texts = [os.fspath(self.given)] if isinstance(self.given, (str, os.PathLike)) else [str(t) for t in self.given]
        if not texts:
            raise UsageError(f"{self.role}= is an empty list.")
        if len(texts) == 1 and (texts[0].endswith(".parquet") or _is_collection_folder(texts[0])):
            return Collection.open(texts[0])
        return self._built(expand_paths(texts))

    def _built(self, files: Sequence[str]) -> Collection:
        facts = [self.role, [_version(file) for file in files], self.bands]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        path = check_output_path(self.folder / f"{self.role}-{key}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # let go by the system when its holder dies
            if path.exists():
                try:
                    return Collection.open(path)
                except CollectionError:
                    _log.warning("%s is not readable and is built again", path)
            dated = "filename" if self.role == "images" else None
            return build(files, path, bands=self.bands, datetime=dated, strict=True)


def sources_of(
    images: Rasters, labels: Rasters | None, bands: tuple[str, ...] | None, quality: QualityMask | None, folder: Path
) -> dict[str, RasterSource]:
    """Those of a datamodule, by role; a quality band is built into the images' records beside `bands`."""
    folder = folder.expanduser()
    named = bands if bands is None or quality is None else (*bands, quality.band)
    found = {"images": RasterSource(role="images", given=images, bands=named, folder=folder)}
    if labels is not None:
        found["labels"] = RasterSource(role="labels", given=labels, bands=None, folder=folder)
    return found


def plain(value: _T) -> _T:
    """Lists, mappings and paths of any kind (Hydra's own among them) as lists, dicts and texts; the rest as it is."""
    found: Any = value
    if isinstance(value, os.PathLike):
        found = os.fspath(value)
    elif isinstance(value, Mapping):
        found = {plain(key): plain(item) for key, item in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        found = [plain(item) for item in value]
    return found  # type: ignore[no-any-return]


def band_names(bands: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of bands; a text alone, which is a sequence of letters, is a UsageError."""
    if isinstance(bands, str):
        raise UsageError(f"bands is a list of names, as [{bands!r}].")
    return None if bands is None else tuple(str(band) for band in bands)


def is_plain(value: Any) -> bool:
    """Whether YAML can hold a value that went through `plain`."""
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _version(path: str) -> list[Any]:
    """What tells one state of a file from another; of a URL, the URL."""
    if is_remote(path) or not os.path.exists(path):
        return [path]
    stat = os.stat(path)
    return [path, stat.st_size, stat.st_mtime_ns]


def _is_collection_folder(path: str) -> bool:
    folder = Path(path)
    return folder.is_dir() and any(folder.rglob("*.parquet")) and not any(folder.rglob("*.tif*"))
