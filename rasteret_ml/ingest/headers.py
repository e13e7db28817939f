"""Many headers at once: bounded, tolerant, reported."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from tqdm import tqdm

from rasteret_ml.errors import RasteretError
from rasteret_ml.fetch.reader import RangeReader
from rasteret_ml.fetch.urls import is_remote, local_path
from rasteret_ml.raster.open import OpenedFile, read_header
from rasteret_ml.raster.together import together

__all__ = ["read_headers"]


async def read_headers(
    reader: RangeReader, hrefs: Sequence[str], *, sidecars: bool | None, max_concurrent: int, progress: bool
) -> dict[str, OpenedFile | RasteretError]:
    """Every file's header, or the reason why there is none. `sidecars` None: those that local files have."""
    limit = asyncio.Semaphore(max_concurrent)
    results: dict[str, OpenedFile | RasteretError] = {}

    async def one(href: str, bar: tqdm) -> None:
        async with limit:
            try:
                results[href] = await read_header(
                    reader, href, sidecars=_has_sidecar(href) if sidecars is None else sidecars
                )
            except RasteretError as error:
                results[href] = error
        bar.update()

    with tqdm(total=len(hrefs), desc="headers", unit="file", disable=not progress) as bar:
        await together([one(href, bar) for href in hrefs])
    return results


def _has_sidecar(href: str) -> bool:
    return not is_remote(href) and any(os.path.exists(local_path(href) + suffix) for suffix in (".ovr", ".msk"))
