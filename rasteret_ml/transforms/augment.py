"""Augmentation: images, labels and validity moved together, by each sample's draw alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
from kornia.constants import DataKey, Resample

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.sample import Sample
from rasteret_ml.transforms.flips import draw_hashes, pixels_of_one_size, random_flip_rot90
from rasteret_ml.transforms.normalize import fill_invalid, ignored_outside, image_keys, label_keys, validity_keys

__all__ = ["Augmentation"]

_ELSEWHERE = 1e-3
"""Share of a pixel that may come from what is not valid: more than rounding makes of nothing, less than can be seen."""
_REFUSED = (K.MixAugmentationBaseV2, K.VideoSequential, K.AugmentationBase3D)


class Augmentation:
    """Random changes of prepared batches in training; call it with a batch, on the device.

    First `random_flip_rot90`, then Kornia's modules, sample by sample, all dates and keys of a sample alike: T is
    folded into C, and images of several keys follow each other along C. A sample's result is a function of its pixels
    and its `draw` (seed, epoch, position) and not of the batch, worker or rank it is in; the global random state
    (torch, CUDA, numpy, Python) is the same afterwards as before.

    Images are interpolated as the modules say, labels take the nearest pixel, on the same coordinates. A pixel is
    valid (`mask_valid`, and every other boolean `mask_...`) only if all pixels that it was interpolated from are. What
    comes from outside the chip or was erased is invalid: 0 in images, False in validities, `ignore_index` (NaN of
    float labels) in labels; whatever fill value a module was given. With a `padding_mode` that repeats pixels nothing
    is outside. Filters (blur, antialiased resizing) take invalid pixels as the mean, which 0 is.

    Images are normalised by then, and not between 0 and 1: modules that clip to that (brightness, colour jitter) are
    not for them; noise, blur, erasing and channel dropout are.

    `bounds` stay those of the ground that was read; `transform` follows flips and turns, and is left out of the batch
    after Kornia's modules, because a rotated chip no longer lies on a grid.

    Args:
        transforms: Modules of `kornia.augmentation`, applied in this order, or one such as an
            `AugmentationSequential`. Other modules see images alone and must not move pixels. What draws from several
            samples (mixup, cutmix, mosaic) is refused.
        turns: Whether to flip and turn first.
        ignore_index: Class of labels that do not count.
        seed: Another one gives other changes to the same draws.

    Raises:
        UsageError: modules that cannot be used so, where that is seen before the first batch.
    """

    def __init__(
        self,
        transforms: Sequence[torch.nn.Module] | torch.nn.Module = (),
        *,
        turns: bool = True,
        ignore_index: int = -100,
        seed: int = 0,
    ) -> None:
        modules: list[Any] = [transforms] if isinstance(transforms, torch.nn.Module) else list(transforms or ())
        for module in modules:
            _refuse_unfit(module)
        self.turns, self.ignore_index, self.seed = bool(turns), int(ignore_index), int(seed)
        bilinear = {DataKey.MASK: {"resample": Resample.BILINEAR}}
        self.modules = K.AugmentationSequential(*modules, data_keys=["input"], extra_args=bilinear) if modules else None
        """All of them as one, None = there are none."""

    def __repr__(self) -> str:
        return f"Augmentation({self.modules or ()}, turns={self.turns}, seed={self.seed})"

    @torch.no_grad()
    def __call__(self, batch: Sample) -> Sample:
        """A changed batch; the given one is left as it was.

        Args:
            batch: Of `normalize`, with `draw` int64 `[B, 3]`, which costs no waiting where it is kept on the host (see
                `to_device`).

        Raises:
            UsageError: a batch that is not prepared or has no `draw`, images and labels of different sizes, or
                modules that make samples of different sizes.
        """
        batch = random_flip_rot90(batch, self.seed) if self.turns else batch
        if self.modules is None:
            return batch
        pixels_of_one_size(batch)
        images = image_keys(batch)
        if not images or not all(batch[key].is_floating_point() for key in images):
            raise UsageError(f"Augmentation works on prepared images; call prepare first. The batch has {list(batch)}.")
        seeds = draw_hashes(batch, 2 * self.seed + 1).tolist()
        planes = torch.cat([_planes(batch[key]) for key in images], dim=1)
        flags = [_planes(batch[key]).to(planes.dtype) for key in validity_keys(batch)]
        moving = torch.cat([_coordinates(planes), *flags], dim=1)
        with _own_randomness(planes.device) as begin:
            found = []
            for i, seed in enumerate(seeds):
                begin(seed)
                found.append(self._moved(planes[i : i + 1], moving[i : i + 1]))
        sizes = {tuple(image.shape[-2:]) for image, _ in found}
        if len(sizes) != 1:
            raise UsageError(f"The modules make samples of different sizes, {sorted(sizes)}, which are no batch.")
        return self._rebuilt(batch, *(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _moved(self, image: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample's planes, and where they come from, `[1, N, H, W]` each."""
        assert self.modules is not None
        try:
            changed, moved = self.modules(image, moving, data_keys=["input", "mask"])
        except NotImplementedError as error:
            raise UsageError(f"Kornia moves images without labels in one of {self.modules}; leave it out.") from error
        if changed.shape[1] != image.shape[1] or changed.shape[-2:] != moved.shape[-2:]:
            raise UsageError(
                f"The modules make an image {tuple(changed.shape[1:])} of {tuple(image.shape[1:])}, and labels "
                f"{tuple(moved.shape[-2:])}; bands must stay, and only modules of kornia.augmentation may move pixels."
            )
        return changed, moved

    def _rebuilt(self, batch: Sample, planes: torch.Tensor, moved: torch.Tensor) -> Sample:
        """The batch with these pixels, and labels and validities from where these come from."""
        (row, col, one, zero), flags = moved[:, :4].unbind(1), moved[:, 4:]
        # Whatever fills what is empty fills both, so their difference is the share that came from the chip.
        inside = _is_one(one - zero)
        ready = {key: value for key, value in batch.items() if key != "transform"}
        images, known = image_keys(batch), validity_keys(batch)
        for key, part in zip(images, _parted(planes, [batch[key] for key in images]), strict=True):
            # Where there is validity, what is empty is filled with all else that is not valid, below.
            ready[key] = part if "mask_valid" in batch else torch.where(inside.view(_beside(part, inside)), part, 0.0)
        for key, part in zip(known, _parted(flags, [batch[key] for key in known]), strict=True):
            ready[key] = _is_one(part) & inside.view(_beside(part, inside))
        fill_invalid(ready)
        for key in label_keys(batch):
            labels = _picked(batch[key], row, col)
            ready[key] = ignored_outside(key, labels, inside, self.ignore_index)
        return ready


def _refuse_unfit(module: torch.nn.Module) -> None:
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"transforms= are modules of kornia.augmentation, not {module!r}.")
    for part in module.modules():
        if isinstance(part, _REFUSED) or (isinstance(part, K.PatchSequential) and not part.is_intensity_only()):
            raise UsageError(
                f"{type(part).__name__} cannot be used: it mixes samples, takes another shape than [B, C, H, W], or "
                "moves images without their labels."
            )


def _planes(value: torch.Tensor) -> torch.Tensor:
    """All between B and H along one axis, `[B, N, H, W]`."""
    return value.reshape(len(value), -1, *value.shape[-2:])


def _parted(planes: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Planes back in the shapes that they had, but for height and width."""
    shapes = [value.shape[:-2] for value in like]
    parts = torch.split(planes, [shape[1:].numel() for shape in shapes], dim=1)
    return [part.reshape(*shape, *planes.shape[-2:]) for part, shape in zip(parts, shapes, strict=True)]


def _beside(value: torch.Tensor, inside: torch.Tensor) -> tuple[int, ...]:
    """A shape in which `inside` `[B, H, W]` goes with a value `[B, ..., H, W]`."""
    return (len(value), *[1] * (value.ndim - 3), *inside.shape[-2:])


def _is_one(share: torch.Tensor) -> torch.Tensor:
    return (share - 1).abs() < _ELSEWHERE


def _coordinates(planes: torch.Tensor) -> torch.Tensor:
    """Row, column, ones and zeros of each pixel, `[B, 4, H, W]`."""
    count, _, height, width = planes.shape
    rows = torch.arange(height, dtype=planes.dtype, device=planes.device)
    cols = torch.arange(width, dtype=planes.dtype, device=planes.device)
    row, col = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack([row, col, torch.ones_like(row), torch.zeros_like(row)]).expand(count, -1, -1, -1)


def _picked(labels: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """The labels `[B, ..., H, W]` nearest to these places `[B, h, w]`."""
    height, width = labels.shape[-2:]
    index = row.round().clamp(0, height - 1) * width + col.round().clamp(0, width - 1)
    flat = labels.reshape(len(labels), -1, height * width)
    places = index.long().flatten(1)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(-1, places).reshape(*labels.shape[:-2], *row.shape[-2:])


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Seeds every generator that a module may draw from; all are as before in the end."""
    on_gpu = device.type == "cuda"
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def begin(seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            yield begin
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
