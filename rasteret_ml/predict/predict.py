"""Predict all chips of a grid with a model and write the map."""

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
from rasteret_ml.predict.progress import data_digest, weights_digest
from rasteret_ml.samples.sample import Sample

__all__ = ["predict_map"]

_HOST_KEYS = ("draw", "transform", "bounds", "crs")
"""Keys that the map needs and the model does not: they stay on the host."""


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
    """Predict all chips of a grid and write the map; see `PredictionMap` for the file, and for how a run continues.

        rm.predict_map(model, data, "map.tif", names=["water", "forest"])

    In a torch process group each rank makes this call and predicts its share of the chips; all return when the map is
    written.

    Args:
        model: From images `[B, C, H, W]` to scores `[B, K, H, W]` or `[B, H, W]`, or class indices `[B, H, W]`. A
            `torch.nn.Module` is in evaluation mode during the call.
        data: A `RasteretDataModule` (its predict loader and normalization), or a DataLoader whose sampler is a
            `GridAOISampler`. With a stride below their size chips overlap.
        path: The file.
        normalize: Applied to each batch on the device; returns one with a float `image`, such as
            `functools.partial(rm.normalize, mean=mean, std=std)`. Default: the datamodule's own, otherwise images are
            only converted to float32.
        version: Identifies the model, so that another model does not continue its map; default a digest of a Module's
            weights.
        device: Device of the model; default the device of its weights.
        progress: Show a progress bar; default in a terminal.
        options: Options of `PredictionMap`: `output`, `merge`, `names`, `colours`, `nodata`, `memory_bytes`,
            `save_seconds`, `block`, `resume`.

    Returns:
        The paths of the maps: one for each target grid of the dataset (several only on native grids).

    Raises:
        UsageError: As for `PredictionMap`, or the loader has no `GridAOISampler`, or replaces chips that it cannot
            read, which would leave holes.
    """
    loader, own_normalize = _resolve_loader(data)
    if getattr(getattr(loader, "errors", None), "action", None) == "replace":
        raise UsageError("errors must not be 'replace' for a map, it leaves holes; choose 'fill' (nodata) or 'retry'.")
    normalize = normalize or own_normalize or (lambda batch: batch | {"image": batch["image"].float()})
    target = _model_device(model) if device is None else torch.device(device)
    options.setdefault("data", data_digest(loader.dataset))
    version = weights_digest(model) if version is None else version
    with PredictionMap(path, loader.sampler, version=version, **options) as prediction_map:
        if prediction_map.chip_count:
            total, hidden = prediction_map.chip_count, None if progress is None else not progress
            bar = tqdm(total=total, unit="chip", desc=os.path.basename(path), disable=hidden)
            with bar, _evaluation_mode(model), torch.inference_mode():
                for batch in _with_sampler(loader, prediction_map.sampler):
                    prediction_map.add(batch, model(normalize(_to_device(batch, target))["image"]))
                    bar.update(len(batch["draw"]))
        return prediction_map.finish()


def _resolve_loader(data: Any) -> tuple[torch.utils.data.DataLoader[Any], Callable[[Sample], Sample] | None]:
    """The loader, and the normalization of a datamodule."""
    normalize = None
    if hasattr(data, "predict_dataloader"):
        data.setup("predict")
        data, normalize = data.predict_dataloader(), lambda batch, module=data: module.on_after_batch_transfer(batch, 0)
    if not isinstance(data, torch.utils.data.DataLoader) or data.batch_size is None:
        raise UsageError(
            "data must be a RasteretDataModule, or a DataLoader with a batch_size and a GridAOISampler, got a "
            f"{type(data).__name__}."
        )
    return data, normalize


def _with_sampler(loader: torch.utils.data.DataLoader[Any], sampler: Any) -> torch.utils.data.DataLoader[Any]:
    """A copy of a loader with another sampler."""
    classes = torch.utils.data.DataLoader, type(loader)
    names = [name for kind in classes for name in inspect.signature(kind.__init__).parameters]
    excluded = {"self", "sampler", "batch_sampler", "shuffle", "drop_last"}
    if not loader.num_workers:
        excluded |= {"prefetch_factor", "multiprocessing_context", "persistent_workers", "timeout"}
    arguments = {name: getattr(loader, name) for name in names if name not in excluded and hasattr(loader, name)}
    return type(loader)(**arguments, sampler=sampler)


def _model_device(model: Any) -> torch.device:
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, torch.nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _to_device(batch: Sample, device: torch.device) -> Sample:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) and key not in _HOST_KEYS else value
        for key, value in batch.items()
    }


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Put a Module in evaluation mode, and each of its parts back afterwards."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
