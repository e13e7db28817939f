"""How far a rank has come, on disk: one small JSON that says which state counts, written after all that it says."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import DataError
from rasteret_ml.predict.output_spec import OutputSpec

__all__ = ["Progress", "load_progress", "save_progress", "write_safely"]

_NAME = "progress.json"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """What is kept of a rank's chips."""

    form: OutputSpec
    """Of the map."""
    generation: int
    """How often it was saved."""
    done: npt.NDArray[np.bool_]
    """Which chips are in it, of all `[N]`."""
    finished: npt.NDArray[np.bool_]
    """Which blocks are finished, and hold something, of all `[M]`."""
    slots: npt.NDArray[np.int64]
    """Number and slot of the other blocks `[K, 2]`."""


def load_progress(folder: Path) -> Progress | None:
    """What was saved last; None where nothing was.

    Raises:
        DataError: a file of another version, or one that cannot be read.
    """
    path = folder / _NAME
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["version"] != _VERSION:
            raise ValueError(f"version {facts['version']}")
        with np.load(folder / facts["state"]) as state:
            chips, blocks = facts["chips"]["of"], facts["blocks"]
            nodata = float("nan") if facts["form"]["nodata"] is None else facts["form"]["nodata"]
            return Progress(
                form=OutputSpec(**(facts["form"] | {"nodata": nodata})),
                generation=facts["generation"],
                done=np.unpackbits(state["done"], count=chips).astype(bool),
                finished=np.unpackbits(state["finished"], count=blocks).astype(bool),
                slots=state["slots"],
            )
    except (KeyError, TypeError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and predict its chips again.") from error


def save_progress(folder: Path, progress: Progress) -> None:
    """Save it; the blocks that it speaks of are on disk already. A saved one counts until this one does."""
    name = f"state-{progress.generation}.npz"
    arrays = io.BytesIO()
    np.savez(arrays, done=np.packbits(progress.done), finished=np.packbits(progress.finished), slots=progress.slots)
    write_safely(folder / name, arrays.getvalue())
    form: dict[str, Any] = dataclasses.asdict(progress.form)
    if np.isnan(form["nodata"]):
        form["nodata"] = None  # JSON has no NaN
    facts = {
        "version": _VERSION,
        "chips": {"done": int(progress.done.sum()), "of": len(progress.done)},
        "blocks": len(progress.finished),
        "form": form,
        "generation": progress.generation,
        "state": name,
    }
    write_safely(folder / _NAME, json.dumps(facts, indent=1).encode())
    for old in folder.glob("state-*.npz"):
        if old.name != name:
            old.unlink()


def write_safely(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after a crash."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
