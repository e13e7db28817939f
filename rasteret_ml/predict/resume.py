"""What must be the same for a map to go on where it was: small facts, kept beside what is predicted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rasteret_ml.datasets.dataset_fingerprint import dataset_fingerprint
from rasteret_ml.errors import ResumeError
from rasteret_ml.fingerprint import differences, digest
from rasteret_ml.predict.mosaic_layout import MapExtent
from rasteret_ml.predict.progress import write_safely

__all__ = ["Fingerprint", "data_digest", "run_fingerprint", "start_or_resume", "weights_digest"]

Fingerprint = dict[str, str]
"""By name, in words or as a digest."""

_NAME = "plan.json"


def run_fingerprint(sampler: Any, sheets: Sequence[MapExtent], **chosen: Any) -> Fingerprint:
    """The facts of a map: its chips, its pixels, and what was chosen."""
    first, last = sampler.times
    grids = [(sheet.grid.crs, tuple(sheet.grid.transform), sheet.grid.shape) for sheet in sheets]
    places = digest(grids, *(np.column_stack([sheet.positions, sheet.corners]) for sheet in sheets))
    height, width = sampler.size
    return {
        "chips": f"{sum(len(sheet.positions) for sheet in sheets)} of {height} x {width} pixels",
        "places": places,
        "times": f"{first} to {last}",
    } | {name: str(value) for name, value in chosen.items()}


def start_or_resume(folder: Path, facts: Mapping[str, str]) -> None:
    """Keep the facts in a folder, or hold them against those that are there.

    Raises:
        ResumeError: they differ; each difference is named.
    """
    path = folder / _NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_safely(path, json.dumps(dict(facts), indent=1).encode())
        return
    saved: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    if found := differences(saved, facts):
        raise ResumeError(
            f"{folder} holds an unfinished map of another plan: {'; '.join(found)}. Make the same one, choose another "
            "path, or begin anew with resume=False."
        )


def data_digest(dataset: Any) -> str:
    """Tells datasets apart, see `dataset_fingerprint`; of None it is empty."""
    return "" if dataset is None else digest(*dataset_fingerprint(dataset))


def weights_digest(model: Any) -> str:
    """Tells modules apart by their weights and buffers; of anything else it is empty."""
    if not isinstance(model, torch.nn.Module):
        return ""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if math.prod(value.shape):
                sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
