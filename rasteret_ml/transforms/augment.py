"""Augmentation that moves images, labels and validity together, determined by each sample's draw; flips and turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import kornia.augmentation as K
import numpy as np
import numpy.typing as npt
import torch
from kornia.constants import DataKey, Resample

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.sample import Sample
from rasteret_ml.transforms.normalize import fill_invalid, ignore_outside, image_keys, label_keys, validity_keys

_GOLDEN, _LAST_SHIFT, _MASK = np.uint64(0x9E3779B97F4A7C15), np.uint64(31), np.uint64(2**63 - 1)
_MIXES = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def draw_hashes(batch: Sample, stream: int) -> npt.NDArray[np.uint64]:
    """Hash each sample's `draw` (seed, epoch, position) and a stream number to 63 bits, `[B]`.

    Mixes with the finaliser of SplitMix64 (Steele, Lea & Flood 2014) after each number.
    """
    draw: torch.Tensor | None = batch.get("draw")
    if draw is None or draw.ndim != 2 or draw.shape[1] != 3:
        raise UsageError(
            "Augmentation needs batch['draw'] (seed, epoch, position; int64 [B, 3]), which this package's samplers "
            "provide; use one of them, or add such a tensor to the batch."
        )
    # In numpy: torch's uint64 supports few operations.
    state = np.full(len(draw), (stream + 1) % 2**64, np.uint64)
    for column in draw.cpu().numpy().astype(np.uint64).T:
        state = state + column + _GOLDEN
        for bits, factor in _MIXES:
            state = (state ^ (state >> bits)) * factor
        state = state ^ (state >> _LAST_SHIFT)
    return state & _MASK


def pixel_keys(batch: Sample) -> tuple[list[str], tuple[int, int]]:
    """Return the keys of images, labels and validities, and their common height and width."""
    keys = [*image_keys(batch), *label_keys(batch), *validity_keys(batch)]
    sizes = {(batch[key].shape[-2], batch[key].shape[-1]) for key in keys}
    if len(sizes) != 1:
        raise UsageError(f"Images and labels must have one size, got {sorted(sizes)} of {keys}.")
    return keys, sizes.pop()


def random_flip_rot90(batch: Sample, seed: int = 0) -> Sample:
    """Flip and turn each sample of a batch at random, in one of the eight orientations of a square.

        batch = rm.random_flip_rot90(rm.normalize(batch, mean, std))

    The orientation depends on the sample's `draw` and the seed alone; images, labels and validity of all dates move
    together. Chips that are not square are flipped and turned by half. No pixel is resampled: `bounds` stay valid, and
    `transform` is updated. The global random state is neither used nor changed.

    Args:
        batch: Normalised or not, with `draw` int64 `[B, 3]`, best on the host, which reads it (see `to_device`).
        seed: Other seeds give other orientations for the same draws.

    Returns:
        A new batch.

    Raises:
        UsageError: a batch without `draw`, or images and labels of different sizes.
    """
    keys, (height, width) = pixel_keys(batch)
    square = height == width
    # The upper bits of the hash: flip columns, flip rows, transpose.
    codes = [code >> 60 if square else code >> 60 & 3 for code in draw_hashes(batch, 2 * seed).tolist()]
    turned = dict(batch)
    for key in keys:
        turned[key] = torch.stack([_oriented(value, code) for value, code in zip(batch[key], codes, strict=True)])
    if "transform" in batch:
        transform: torch.Tensor = batch["transform"]
        matrices = torch.tensor(np.array([_matrix(code, height, width) for code in codes]), dtype=transform.dtype)
        turned["transform"] = (transform.reshape(-1, 3, 3) @ matrices.to(transform.device)).reshape(transform.shape)
    return turned


def _oriented(value: torch.Tensor, code: int) -> torch.Tensor:
    flip_columns, flip_rows, transpose = _bits(code)
    axes = [-1] * flip_columns + [-2] * flip_rows
    value = value.flip(axes) if axes else value
    return value.transpose(-1, -2) if transpose else value


def _matrix(code: int, height: int, width: int) -> npt.NDArray[np.int64]:
    """Return the 3 x 3 matrix from (column, row) after the move to (column, row) before it."""
    flip_columns, flip_rows, transpose = _bits(code)
    column, row = (-1, 0, width) if flip_columns else (1, 0, 0), (0, -1, height) if flip_rows else (0, 1, 0)
    return np.array([column, row, (0, 0, 1)])[:, [1, 0, 2] if transpose else [0, 1, 2]]


def _bits(code: int) -> tuple[bool, bool, bool]:
    return bool(code & 1), bool(code & 2), bool(code & 4)


_TOLERANCE = 1e-3  # Share of a pixel that may come from invalid ones: more than rounding errors, less than is visible.
_UNSUPPORTED = (K.MixAugmentationBaseV2, K.VideoSequential, K.AugmentationBase3D)


class Augmentation:
    """Augments normalised batches for training, on the device.

        augment = rm.Augmentation([K.RandomAffine(30.0), K.RandomGaussianNoise(std=0.1)])
        batch = augment(rm.normalize(batch, mean, std))

    In YAML, for example as `data.augment` (Hydra: `_target_` instead of `class_path`, without `init_args`):

        class_path: rasteret_ml.Augmentation
        init_args:
          transforms:
            - class_path: kornia.augmentation.RandomAffine
              init_args: {degrees: 30}

    Applies `random_flip_rot90`, then Kornia's modules sample by sample, to all dates and keys of a sample alike: T is
    folded into C, and images of several keys are concatenated along C. The result for a sample depends on its pixels
    and its `draw` (seed, epoch, position) alone, not on the batch, worker or rank. The global random state (torch,
    CUDA, numpy, Python) is restored. The price is speed: a module runs once per sample instead of once per batch.

    Images are interpolated as the modules define, labels take the nearest pixel, at the same coordinates. A pixel is
    valid (`mask_valid`, and every other boolean `mask_...`) if all pixels that it is interpolated from are. Pixels from
    outside the chip and erased pixels are invalid, whatever fill value a module has: 0 in images, False in validities,
    `ignore_index` (NaN in float labels) in labels. With a `padding_mode` that repeats pixels nothing is outside.
    Filters (blur, antialiased resizing) see invalid pixels as the mean, 0.

    Normalised images do not lie between 0 and 1, so modules that clip to that range (brightness, colour jitter) do not
    suit them; noise, blur, erasing and channel dropout do.

    `bounds` stay those of the area that was read. `transform` follows flips and turns, and is removed by Kornia's
    modules, because a rotated chip does not lie on a grid.

    Args:
        transforms: Modules of `kornia.augmentation`, applied in this order, or one such as an `AugmentationSequential`.
            Other modules get images alone and must not move pixels. Modules that combine samples (mixup, cutmix,
            mosaic) are not supported.
        turns: Whether to flip and turn first.
        ignore_index: Label to ignore.
        seed: Other seeds give other changes for the same draws.

    Raises:
        UsageError: unsupported modules; some are only found out with the first batch.
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
            _check_supported(module)
        self.turns, self.ignore_index, self.seed = bool(turns), int(ignore_index), int(seed)
        bilinear = {DataKey.MASK: {"resample": Resample.BILINEAR}}
        #: All modules in one; None = no modules.
        self.modules = K.AugmentationSequential(*modules, data_keys=["input"], extra_args=bilinear) if modules else None

    def __repr__(self) -> str:
        return f"Augmentation({self.modules or ()}, turns={self.turns}, seed={self.seed})"

    @torch.no_grad()
    def __call__(self, batch: Sample) -> Sample:
        """Augment a batch; the given one is not changed.

        Args:
            batch: What `normalize` returned, with `draw` int64 `[B, 3]`, best on the host (see `to_device`).

        Raises:
            UsageError: a batch that is not normalised or has no `draw`, images and labels of different sizes, or
                modules that return samples of different sizes.
        """
        batch = random_flip_rot90(batch, self.seed) if self.turns else batch
        if self.modules is None:
            return batch
        pixel_keys(batch)
        images = image_keys(batch)
        if not images or not all(batch[key].is_floating_point() for key in images):
            raise UsageError(f"Augmentation needs float images, got {list(batch)}; call normalize first.")
        seeds = draw_hashes(batch, 2 * self.seed + 1).tolist()
        planes = torch.cat([_planes(batch[key]) for key in images], dim=1)
        flags = [_planes(batch[key]).to(planes.dtype) for key in validity_keys(batch)]
        moving = torch.cat([_coordinates(planes), *flags], dim=1)
        with _seeded_generators(planes.device) as seed_all:
            results = []
            for i, seed in enumerate(seeds):
                seed_all(seed)
                results.append(self._transform(planes[i : i + 1], moving[i : i + 1]))
        sizes = {tuple(image.shape[-2:]) for image, _ in results}
        if len(sizes) != 1:
            raise UsageError(f"transforms must return samples of one size, got different sizes {sorted(sizes)}.")
        return self._rebuild(batch, *(torch.cat(parts) for parts in zip(*results, strict=True)))

    def _transform(self, image: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform one sample's planes and their coordinates and validities, `[1, N, H, W]` each."""
        assert self.modules is not None
        try:
            changed, moved = self.modules(image, moving, data_keys=["input", "mask"])
        except NotImplementedError as error:
            raise UsageError(f"Kornia moves images without labels in one of {self.modules}; leave it out.") from error
        if changed.shape[1] != image.shape[1] or changed.shape[-2:] != moved.shape[-2:]:
            raise UsageError(
                f"transforms must keep bands and move labels with images, got an image {tuple(changed.shape[1:])} from "
                f"{tuple(image.shape[1:])} and labels {tuple(moved.shape[-2:])}; only modules of kornia.augmentation "
                "may move pixels."
            )
        return changed, moved

    def _rebuild(self, batch: Sample, planes: torch.Tensor, moved: torch.Tensor) -> Sample:
        """Put transformed planes `[B, N, H, W]` back into a batch, with labels taken at the moved coordinates."""
        (row, col, one, zero), flags = moved[:, :4].unbind(1), moved[:, 4:]
        # A fill value replaces both planes, so that their difference is the share that comes from the chip.
        inside = _is_one(one - zero)
        result = {key: value for key, value in batch.items() if key != "transform"}
        images, masks = image_keys(batch), validity_keys(batch)
        for key, image in zip(images, _unstack(planes, [batch[key] for key in images]), strict=True):
            # With `mask_valid`, pixels from outside are filled below, together with all that are invalid.
            result[key] = image if "mask_valid" in batch else torch.where(_like(inside, image), image, 0.0)
        for key, mask in zip(masks, _unstack(flags, [batch[key] for key in masks]), strict=True):
            result[key] = _is_one(mask) & _like(inside, mask)
        fill_invalid(result)
        for key in label_keys(batch):
            labels = _nearest(batch[key], row, col)
            result[key] = ignore_outside(key, labels, inside, self.ignore_index)
        return result


def _check_supported(module: torch.nn.Module) -> None:
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"transforms must be modules of kornia.augmentation, got {module!r}.")
    for part in module.modules():
        if isinstance(part, _UNSUPPORTED) or (isinstance(part, K.PatchSequential) and not part.is_intensity_only()):
            raise UsageError(
                f"{type(part).__name__} is not supported: it mixes samples, takes another shape than [B, C, H, W], or "
                "moves images without their labels."
            )


def _planes(value: torch.Tensor) -> torch.Tensor:
    """Flatten all axes between B and H, to `[B, N, H, W]`."""
    return value.reshape(len(value), -1, *value.shape[-2:])


def _unstack(planes: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Split planes into the shapes of `like`, but for height and width."""
    shapes = [value.shape[:-2] for value in like]
    parts = torch.split(planes, [shape[1:].numel() for shape in shapes], dim=1)
    return [part.reshape(*shape, *planes.shape[-2:]) for part, shape in zip(parts, shapes, strict=True)]


def _like(inside: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """View `inside` `[B, H, W]` so that it broadcasts to a value `[B, ..., H, W]`."""
    return inside.view(len(value), *[1] * (value.ndim - 3), *inside.shape[-2:])


def _is_one(share: torch.Tensor) -> torch.Tensor:
    return (share - 1).abs() < _TOLERANCE


def _coordinates(planes: torch.Tensor) -> torch.Tensor:
    """Return planes of each pixel's row and column, of ones and of zeros, `[B, 4, H, W]`."""
    count, _, height, width = planes.shape
    rows = torch.arange(height, dtype=planes.dtype, device=planes.device)
    cols = torch.arange(width, dtype=planes.dtype, device=planes.device)
    row, col = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack([row, col, torch.ones_like(row), torch.zeros_like(row)]).expand(count, -1, -1, -1)


def _nearest(labels: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """Return the labels `[B, ..., H, W]` nearest to coordinates `[B, h, w]`."""
    height, width = labels.shape[-2:]
    index = row.round().clamp(0, height - 1) * width + col.round().clamp(0, width - 1)
    flat = labels.reshape(len(labels), -1, height * width)
    index = index.long().flatten(1)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(-1, index).reshape(*labels.shape[:-2], *row.shape[-2:])


@contextmanager
def _seeded_generators(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Give a function that seeds every generator a module may draw from; restore their states at the end."""
    on_gpu = device.type == "cuda"
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def seed_all(seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            yield seed_all
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
