"""What is saved beside an unfinished map: the fingerprint of the run, and the progress of each rank."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch

from rasteret_ml.datasets.combine import dataset_fingerprint
from rasteret_ml.errors import DataError, ResumeError
from rasteret_ml.fingerprint import digest
from rasteret_ml.predict.blend import OutputSpec
from rasteret_ml.predict.mosaic_layout import MapExtent

__all__ = [
    "Progress", "data_digest", "load_progress", "missing_positions", "run_fingerprint", "save_progress", "saved_shards",
    "shard_folder", "start_or_resume", "weights_digest",
]  # fmt: skip

_RUN_FILE, _PROGRESS_FILE = "plan.json", "progress.npz"
_VERSION = 2
"""Version of the files in `<path>.parts`; 1 had a `progress.json` for each rank."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """The saved state of a rank's shard."""

    spec: OutputSpec
    """What the map holds."""
    done: npt.NDArray[np.bool_]
    """Which chips it has, by position `[N]`."""
    finished: npt.NDArray[np.bool_]
    """Which blocks are finished and not empty `[M]`."""
    slots: npt.NDArray[np.int64]
    """Numbers and slots of the other blocks `[K, 2]`."""


def shard_folder(folder: Path, rank: int) -> Path:
    """Return the folder of a rank's shard."""
    return folder / f"shard-{rank}"


def saved_shards(folder: Path) -> list[tuple[Path, Progress]]:
    """Return folder and progress of all saved shards, also of ranks of earlier runs."""
    paths = sorted(folder.glob("shard-*"))
    return [(path, progress) for path in paths if (progress := load_progress(path)) is not None]


def missing_positions(folder: Path, total: int) -> npt.NDArray[np.int64]:
    """Return the positions of chips that no saved shard has."""
    done = np.zeros(total, bool)
    for _, progress in saved_shards(folder):
        done |= progress.done
    return np.flatnonzero(~done)


def load_progress(folder: Path) -> Progress | None:
    """Load the state that was saved last; None if there is none.

    Raises:
        DataError: A file has another version or cannot be read.
    """
    path = folder / _PROGRESS_FILE
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            fields = json.loads(str(file["fields"]))
            if fields["version"] != _VERSION:
                raise ValueError(f"version {fields['version']}, not {_VERSION}")
            arrays = {name: file[name] for name in ("done", "finished", "slots")}
            return Progress(spec=OutputSpec(**fields["spec"]), **arrays)
    except (KeyError, TypeError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and predict its chips again.") from error


def save_progress(folder: Path, progress: Progress) -> None:
    """Save a state whose blocks are on disk; until then the one saved before remains valid."""
    fields = json.dumps({"version": _VERSION, "spec": dataclasses.asdict(progress.spec)})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, fields=fields, done=progress.done, finished=progress.finished, slots=progress.slots)
    _write_atomically(folder / _PROGRESS_FILE, buffer.getvalue())


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file that exists as a whole or not at all, also after a crash."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def run_fingerprint(sampler: Any, extents: Sequence[MapExtent], **options: Any) -> dict[str, str]:
    """Return what must not change between runs that make one map: its chips, pixels and options, by name."""
    first, last = sampler.times
    grids = [(extent.grid.crs, tuple(extent.grid.transform), extent.grid.shape) for extent in extents]
    height, width = sampler.size
    return {
        "chips": f"{sum(len(extent.positions) for extent in extents)} of {height} x {width} pixels",
        "places": digest(grids, *(np.column_stack([extent.positions, extent.corners]) for extent in extents)),
        "times": f"{first} to {last}",
        "format": str(_VERSION),
    } | {name: str(value) for name, value in options.items()}


def start_or_resume(folder: Path, fingerprint: Mapping[str, str]) -> None:
    """Save the fingerprint of a run in `folder`, or compare it with the one that is saved there.

    Raises:
        ResumeError: They differ; the message names each difference.
    """
    path = folder / _RUN_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, json.dumps(dict(fingerprint), indent=1).encode())
        return
    saved: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{name}: {saved.get(name, 'missing')} then, {fingerprint.get(name, 'missing')} now"
        for name in dict.fromkeys([*fingerprint, *saved])
        if saved.get(name) != fingerprint.get(name)
    ]
    if differences:
        raise ResumeError(
            f"{folder} holds an unfinished map of another run: {'; '.join(differences)}. Use the same arguments, "
            "choose another path, or start over with resume=False."
        )


def data_digest(dataset: Any) -> str:
    """Return a digest of a dataset (see `dataset_fingerprint`), empty for None."""
    return "" if dataset is None else digest(*dataset_fingerprint(dataset))


def weights_digest(model: Any) -> str:
    """Return a digest of a module's weights and buffers, empty for anything else."""
    if not isinstance(model, torch.nn.Module):
        return ""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if math.prod(value.shape):
                sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
