"""Many headers at once: bounded, tolerant, reported."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tqdm import tqdm

from rasteret_ml.errors import RasteretError
from rasteret_ml.fetch.reader import RangeReader
from rasteret_ml.raster.open import OpenedFile, read_header
from rasteret_ml.raster.together import together

__all__ = ["read_headers"]


async def read_headers(
    reader: RangeReader, hrefs: Sequence[str], *, max_concurrent: int, progress: bool
) -> dict[str, OpenedFile | RasteretError]:
    """Every file's header, or the reason why there is none."""
    limit = asyncio.Semaphore(max_concurrent)
    results: dict[str, OpenedFile | RasteretError] = {}

    async def one(href: str, bar: tqdm) -> None:
        async with limit:
            try:
                results[href] = await read_header(reader, href)
            except RasteretError as error:
                results[href] = error
        bar.update()

    with tqdm(total=len(hrefs), desc="headers", unit="file", disable=not progress) as bar:
        await together([one(href, bar) for href in hrefs])
    return results
