"""The Collection of a datamodule's images or labels: opened, or built once from files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.build.read_source import expand_paths
from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.write import check_output_path
from rasteret_ml.errors import CollectionError, UsageError
from rasteret_ml.storage.urls import is_remote

__all__ = ["RasterSource", "Rasters"]

_log = logging.getLogger(__name__)

Rasters = str | list[str] | os.PathLike[str] | Collection
"""A Collection or its path, or GeoTIFFs: a path, glob, folder, URL, `.txt` list, STAC item, or a list of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterSource:
    """Rasters as the user gave them, and how to get their Collection."""

    role: Literal["images", "labels"]
    """What they are; labels get no date, because they apply to every image of their place."""
    given: Rasters
    """What the user gave."""
    bands: tuple[str, ...] | None
    """Band names, by which files of one band each are grouped; None = each file is a record."""
    folder: Path
    """Where to build a Collection."""

    def open(self) -> Collection:
        """Open the Collection, or build it; of several processes one builds and the others wait.

        Raises:
            UsageError: no files, or a folder that cannot be written to.
            DataError, FetchError: the first file that cannot be read. Build the Collection with `build` to skip it.
        """
        if isinstance(self.given, Collection):
            return self.given
        paths = [self.given] if isinstance(self.given, (str, os.PathLike)) else self.given
        texts = [os.fspath(path) for path in paths]
        if not texts:
            raise UsageError(f"{self.role} must not be empty; give at least one path.")
        if len(texts) == 1 and (texts[0].endswith(".parquet") or _is_collection_folder(texts[0])):
            return Collection.open(texts[0])
        return self._built(expand_paths(texts))

    def _built(self, files: Sequence[str]) -> Collection:
        identity = [self.role, [_version(file) for file in files], self.bands]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = check_output_path(self.folder / f"{self.role}-{key}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # the system releases it if its holder dies
            if path.exists():
                try:
                    return Collection.open(path)
                except CollectionError:
                    _log.warning("%s is not readable and is built again", path)
            datetime = "filename" if self.role == "images" else None
            return build(files, path, bands=self.bands, datetime=datetime, strict=True)


def _version(path: str) -> list[Any]:
    """Return what identifies a state of a file (path, size, time of change); of a URL, the URL."""
    if is_remote(path) or not os.path.exists(path):
        return [path]
    stat = os.stat(path)
    return [path, stat.st_size, stat.st_mtime_ns]


def _is_collection_folder(path: str) -> bool:
    folder = Path(path)
    return folder.is_dir() and any(folder.rglob("*.parquet")) and not any(folder.rglob("*.tif*"))
