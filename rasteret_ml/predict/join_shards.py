"""The parts of all ranks to one file for each map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.window import Window
from rasteret_ml.predict.mosaic_layout import MapExtent
from rasteret_ml.predict.output_spec import OutputSpec
from rasteret_ml.predict.progress import Progress, load_progress
from rasteret_ml.predict.rank_shard import SavedShard
from rasteret_ml.predict.write_cog import Legend, write_cog

__all__ = ["join_parts", "part_folder", "saved_parts", "unpredicted"]


def part_folder(folder: Path, rank: int) -> Path:
    """Where a rank's part lies."""
    return folder / f"part-{rank}"


def saved_parts(folder: Path) -> list[tuple[Path, Progress]]:
    """What any rank has saved, also ranks that are no more."""
    found = ((path, load_progress(path)) for path in sorted(folder.glob("part-*")))
    return [(path, progress) for path, progress in found if progress is not None]


def unpredicted(folder: Path, total: int) -> npt.NDArray[np.int64]:
    """Positions of chips that are in no part."""
    done = np.zeros(total, bool)
    for _, progress in saved_parts(folder):
        done |= progress.done
    return np.flatnonzero(~done)


def join_parts(folder: Path, sheets: Sequence[MapExtent], paths: Sequence[str], legend: Legend) -> None:
    """Write the maps.

    Raises:
        UsageError: parts of several forms.
    """
    found = saved_parts(folder)
    forms = {repr(progress.form): progress.form for _, progress in found}
    if len(forms) != 1:
        raise UsageError(
            f"The ranks predicted maps of {len(forms)} forms: {'; '.join(forms)}; delete {folder} and predict again."
        )
    (form,) = forms.values()
    with ExitStack() as stack:
        parts = []
        for where, progress in found:
            parts.append(SavedShard(where, progress))
            stack.callback(parts[-1].close)
        for sheet, path in zip(sheets, paths, strict=True):
            write_cog(path, folder, sheet, form, legend, _blocks(sheet, parts, form))


def _blocks(
    sheet: MapExtent, parts: Sequence[SavedShard], form: OutputSpec
) -> Iterator[tuple[Window, npt.NDArray[Any]]]:
    for number in range(sheet.first, sheet.first + sheet.blocks):
        pixels = _joined(number, parts, form)
        if pixels is not None:
            window = sheet.window_of_block(number)
            yield window, pixels[:, : window.height, : window.width]


def _joined(number: int, parts: Sequence[SavedShard], form: OutputSpec) -> npt.NDArray[Any] | None:
    whole = None
    for part in parts:
        pixels = part.finished(number)
        if pixels is not None:
            return pixels
        block = part.block(number)
        if block is None:
            continue
        if whole is None:
            whole = block
        else:
            form.merging.join(whole, block)
    return None if whole is None else form.render(whole)
