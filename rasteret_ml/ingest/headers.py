"""Many headers at once: bounded, tolerant, reported."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence

from tqdm import tqdm

from rasteret_ml.errors import RasteretError
from rasteret_ml.fetch.reader import RangeReader
from rasteret_ml.fetch.urls import is_remote, local_path
from rasteret_ml.raster.open import HeaderParser, OpenedFile, read_header
from rasteret_ml.raster.together import together

__all__ = ["read_headers"]


async def read_headers(
    reader: RangeReader,
    hrefs: Sequence[str],
    take: Callable[[str, OpenedFile | RasteretError], Awaitable[None]],
    *,
    sidecars: bool | None,
    max_concurrent: int,
    progress: bool,
) -> None:
    """Give `take` every file's header, or the reason why there is none, as they come.

    There are `max_concurrent` tasks, however many files: each reads one file after another, and the next only once
    `take` has done with the last.

    Args:
        reader: Where bytes come from.
        hrefs: The files, in the order in which they are begun.
        take: Called with each address and what was found there; what it raises ends the whole.
        sidecars: Look for `.ovr` and `.msk` beside files; None = those that local files have.
        max_concurrent: Files in flight.
        progress: Show a progress bar.
    """
    parser, queue = HeaderParser(), iter(hrefs)

    async def work(bar: tqdm) -> None:
        for href in queue:
            result: OpenedFile | RasteretError
            try:
                beside = _has_sidecar(href) if sidecars is None else sidecars
                result = await read_header(reader, href, sidecars=beside, parser=parser)
            except RasteretError as error:
                result = error
            await take(href, result)
            bar.update()

    with tqdm(total=len(hrefs), desc="headers", unit="file", disable=not progress) as bar:
        await together([work(bar) for _ in range(min(max_concurrent, len(hrefs)))])


def _has_sidecar(href: str) -> bool:
    return not is_remote(href) and any(os.path.exists(local_path(href) + suffix) for suffix in (".ovr", ".msk"))
