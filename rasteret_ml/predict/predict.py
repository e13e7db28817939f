"""A model, a loader and a path: predict everything and write the map."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.data
from tqdm import tqdm

from rasteret_ml.errors import UsageError
from rasteret_ml.predict.prediction_map import PredictionMap
from rasteret_ml.predict.resume import data_digest, weights_digest
from rasteret_ml.samples.sample import Sample

__all__ = ["loader_over", "predict_map"]

_STAYS = ("draw", "transform", "bounds", "crs")
"""Keys that say where a chip lies; the map wants them, the model does not."""


def predict_map(
    model: Callable[[torch.Tensor], torch.Tensor],
    data: Any,
    path: str | os.PathLike[str],
    *,
    normalize: Callable[[Sample], Sample] | None = None,
    version: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> list[str]:
    """Predict all chips of a grid and write the map; see `PredictionMap` for what is written, and how it goes on.

    Under a torch process group the ranks share the chips, each with this call; all return when the map is there.

    Args:
        model: From images `[B, C, H, W]` to scores `[B, K, H, W]` or `[B, H, W]`, or classes `[B, H, W]`. A
            `torch.nn.Module` is put in evaluation mode meanwhile.
        data: A `RasteretDataModule` (its predict loader, and its own preparation), or a DataLoader whose sampler is a
            `GridAOISampler`. Chips of a stride below their size overlap.
        path: The file.
        normalize: From a batch on the device to one with a float `image`, such as
            `functools.partial(rm.normalize, mean=mean, std=std)`; with a datamodule default its own. Else images
            are only made float32.
        version: Tells models apart, so that a map is not finished with another one than it was begun with; default a
            digest of a Module's weights.
        device: Where the model runs; default where its weights are.
        progress: Show a bar; default in a terminal.
        options: Of `PredictionMap`: `output`, `merge`, `names`, `colours`, `nodata`, `memory_bytes`, `save_seconds`,
            `block`, `resume`.

    Returns:
        The paths of the maps: one, or one for each frame of a dataset on native grids.

    Raises:
        UsageError: as for `PredictionMap`, or a loader without a `GridAOISampler`, or one that replaces what it cannot
            read, which would leave holes.
    """
    loader, own = _loader_of(data)
    if getattr(getattr(loader, "errors", None), "action", None) == "replace":
        raise UsageError("errors='replace' puts other chips in a map's holes; choose 'fill' (nodata), or 'retry'.")
    ready = normalize or own or _as_float
    chosen = _device_of(model) if device is None else torch.device(device)
    facts = {"version": weights_digest(model) if version is None else version, "data": data_digest(loader.dataset)}
    with PredictionMap(path, loader.sampler, **(facts | options)) as found:
        if found.to_do:
            over = loader_over(loader, found.sampler)
            bar = tqdm(total=found.to_do, unit="chip", desc=os.path.basename(path), disable=_silent(progress))
            with bar, _evaluating(model), torch.inference_mode():
                for batch in over:
                    found.add(batch, model(ready(_moved(batch, chosen))["image"]))
                    bar.update(len(batch["draw"]))
        return found.finish()


def _loader_of(data: Any) -> tuple[torch.utils.data.DataLoader[Any], Callable[[Sample], Sample] | None]:
    """The loader, and how a datamodule prepares batches."""
    own = None
    if hasattr(data, "predict_dataloader"):
        data.setup("predict")
        data, own = data.predict_dataloader(), lambda batch, module=data: module.on_after_batch_transfer(batch, 0)
    if not isinstance(data, torch.utils.data.DataLoader) or data.batch_size is None:
        raise UsageError(
            "predict_map takes a RasteretDataModule or a DataLoader with a batch_size and a GridAOISampler, not "
            f"{type(data).__name__}."
        )
    return data, own


def loader_over(loader: torch.utils.data.DataLoader[Any], sampler: Any) -> torch.utils.data.DataLoader[Any]:
    """A loader like another one, over another sampler."""
    kind = type(loader)
    names = {**inspect.signature(torch.utils.data.DataLoader.__init__).parameters}
    names |= inspect.signature(kind.__init__).parameters
    taken = {"self", "sampler", "batch_sampler", "shuffle", "drop_last"}
    if not loader.num_workers:
        taken |= {"prefetch_factor", "multiprocessing_context", "persistent_workers", "timeout"}
    same = {name: getattr(loader, name) for name in names if name not in taken and hasattr(loader, name)}
    return kind(**same, sampler=sampler)


def _as_float(batch: Sample) -> Sample:
    return batch | {"image": batch["image"].float()}


def _device_of(model: Any) -> torch.device:
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, torch.nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _moved(batch: Sample, device: torch.device) -> Sample:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) and key not in _STAYS else value
        for key, value in batch.items()
    }


def _silent(progress: bool | None) -> bool | None:
    """What tqdm takes: None = silent but in a terminal."""
    return None if progress is None else not progress


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A Module in evaluation mode, each part put back as it was."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    were = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in were.items():
            module.training = training
