"""Augmentation keeps images, labels and validity together, and is a function of each sample's draw."""

from __future__ import annotations

import copy
import pickle
import random

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.transforms.augment import draw_hashes

SIZE = 48
GEOMETRIC = {
    "rotation": lambda: K.RandomRotation(37.0, p=1.0),
    "affine": lambda: K.RandomAffine(30.0, translate=(0.2, 0.2), scale=(0.7, 1.3), shear=(10.0, 10.0), p=1.0),
    "affine, nearest": lambda: K.RandomAffine(30.0, resample="nearest", p=1.0),
    "perspective": lambda: K.RandomPerspective(0.4, p=1.0),
    "elastic": lambda: K.RandomElasticTransform(p=1.0),
    "resized crop": lambda: K.RandomResizedCrop((32, 32)),
    "resized crop, warped": lambda: K.RandomResizedCrop((64, 64), cropping_mode="resample"),
    "resize": lambda: K.Resize((24, 24)),
    "padded crop": lambda: K.RandomCrop((40, 40), padding=12),
    "padded crop, filled": lambda: K.RandomCrop((40, 40), padding=12, fill=1.0),
    "padding": lambda: K.PadTo((60, 60), pad_value=1.0),
    "erasing": lambda: K.RandomErasing(p=1.0),
    "erasing, filled": lambda: K.RandomErasing(value=1.0, p=1.0),
    "flip": lambda: K.RandomHorizontalFlip(p=0.5),
    "two": lambda: K.AugmentationSequential(
        K.RandomAffine(20.0, p=0.7), K.RandomErasing(p=0.7), K.RandomCrop((40, 40), padding=4), data_keys=["input"]
    ),
    "one of two": lambda: K.AugmentationSequential(
        K.RandomAffine(20.0, p=1.0), K.RandomErasing(p=1.0), random_apply=1, data_keys=["input"]
    ),
}
EMPTYING = ("rotation", "affine", "padded crop", "padded crop, filled", "padding", "erasing", "erasing, filled", "two")


def place(size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each pixel."""
    return torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")


def draws(count: int, epoch: int = 0, seed: int = 7) -> torch.Tensor:
    """Of positions 0, 1, 2 ..."""
    return torch.tensor([[seed, epoch, position] for position in range(count)])


def placed(count: int = 4) -> dict[str, torch.Tensor]:
    """Pixels that say where they were: an image of row and column, 1 and up, and labels of both, all valid."""
    row, col = place()
    return {
        "image": torch.stack([row, col])[None].float().repeat(count, 1, 1, 1) + 1,
        "mask": (row * 1000 + col)[None].repeat(count, 1, 1),
        "mask_row": row[None].float().repeat(count, 1, 1),
        "mask_valid": torch.ones(count, 1, SIZE, SIZE, dtype=torch.bool),
        "draw": draws(count),
    }


@pytest.mark.parametrize("name", GEOMETRIC)
def test_images_labels_and_validity_stay_aligned(name):
    """Each valid pixel shows the place that its label names, to half a pixel; what is empty is so everywhere."""
    out = rm.Augmentation([GEOMETRIC[name]()])(placed())
    labels, valid = out["mask"], out["mask_valid"][:, 0]
    known = labels != -100
    assert torch.equal(known, valid)
    assert torch.equal(out["mask_row"].isnan(), ~known)
    assert torch.equal(out["mask_row"][known].long(), labels[known] // 1000)
    shown = out["image"].movedim(1, -1)[valid] - 1
    named = torch.stack([labels[valid] // 1000, labels[valid] % 1000], dim=-1)
    assert (shown - named).abs().max() <= 0.501
    assert (out["image"].movedim(1, -1)[~valid] == 0).all()
    assert 0.2 < valid.float().mean() <= 1
    if name in EMPTYING:
        assert not valid.all()
    assert len({tuple(sample.flatten().tolist()) for sample in labels}) > (name not in ("resize", "padding"))


@pytest.mark.parametrize("modules", [[], [K.RandomRotation90((1, 3), p=1.0)], [K.RandomVerticalFlip(p=1.0)]])
def test_a_checkerboard_stays_one(modules):
    """Squares of the image, labels of their colours and validity of the black ones, on series and a second image."""
    row, col = place()
    black = ((row // 6 + col // 6) % 2).bool()
    batch = {
        "image": torch.where(black, 1.0, -1.0).expand(5, 3, 2, SIZE, SIZE).clone(),
        "image_s1": torch.where(black, 5.0, 7.0).expand(5, 1, SIZE, SIZE).clone(),
        "mask": black.long().expand(5, SIZE, SIZE).clone(),
        "mask_clear": black.expand(5, 3, 1, SIZE, SIZE).clone(),
        "mask_valid": torch.ones(5, 3, 1, SIZE, SIZE, dtype=torch.bool),
        "draw": draws(5),
        "label": torch.arange(5),
    }
    batch["image"] += row[0] / 1000  # so that a turn is seen
    out = rm.Augmentation(modules)(batch)
    colours = out["mask"].bool()
    assert torch.equal((out["image"] > 0).all(1).all(1), colours)
    assert torch.equal((out["image"] > 0).any(1).any(1), colours)
    assert torch.equal(out["image_s1"][:, 0].round() == 5, colours)
    assert torch.equal(out["mask_clear"], colours[:, None, None].expand(5, 3, 1, SIZE, SIZE))
    assert out["mask_valid"].all()
    assert torch.equal(out["label"], batch["label"])
    assert not torch.equal(out["image"], batch["image"])


@pytest.mark.parametrize("name", ["rotation", "affine", "perspective", "resized crop", "elastic", "two"])
def test_invalid_pixels_do_not_bleed(name):
    """Whatever stands in a hole, no valid pixel changes by more than a thousandth of it."""
    batch = placed()
    batch["mask_valid"][:, :, 10:20, 15:30] = False
    hole = ~batch["mask_valid"].expand_as(batch["image"])
    results = []
    for value in (0.0, 100.0):
        given = batch | {"image": torch.where(hole, value, batch["image"])}
        results.append(rm.Augmentation([GEOMETRIC[name]()])(given))
    first, second = results
    assert torch.equal(first["mask_valid"], second["mask_valid"])
    assert (first["image"] - second["image"]).abs().max() <= 0.11
    assert not first["mask_valid"].all()
    # Labels have no hole.
    assert ((first["mask"] != -100) & ~first["mask_valid"][:, 0]).any()


def test_each_band_and_date_has_its_own_validity():
    """A hole of one date stays one of that date."""
    valid = torch.ones(1, 2, 1, SIZE, SIZE, dtype=torch.bool)
    valid[:, 1, :, 12:36, 12:36] = False
    batch = {"image": torch.ones(1, 2, 2, SIZE, SIZE), "mask_valid": valid, "draw": draws(1)}
    out = rm.Augmentation([K.RandomRotation(37.0, p=1.0)])(batch)
    middle = out["image"][0, :, :, 23:25, 23:25]
    assert (middle[0] == 1).all()
    assert (middle[1] == 0).all()


def test_without_validity_what_is_empty_is_filled_all_the_same():
    """A batch that says nothing of validity is valid until something empties it."""
    batch = {key: value for key, value in placed().items() if key != "mask_valid"}
    out = rm.Augmentation([K.RandomErasing(value=1.0, p=1.0)])(batch)
    assert "mask_valid" not in out
    empty = (out["mask"] == -100)[:, None].expand_as(out["image"])
    assert empty.any()
    assert (out["image"][empty] == 0).all()
    assert (out["image"][~empty] > 0).all()


def test_noise_stays_off_what_is_invalid_and_off_labels():
    """Changes of values alone leave places alone."""
    batch = placed()
    batch["mask_valid"][:, :, :5] = False
    batch["image"] = torch.where(batch["mask_valid"], batch["image"], 0.0)
    out = rm.Augmentation([K.RandomGaussianNoise(std=1.0, p=1.0)], turns=False)(batch)
    assert torch.equal(out["mask"], batch["mask"])
    assert torch.equal(out["mask_valid"], batch["mask_valid"])
    assert (out["image"][:, :, :5] == 0).all()
    assert (out["image"][:, :, 5:] != batch["image"][:, :, 5:]).float().mean() > 0.99


CHAIN = [K.RandomAffine(30.0, p=0.8), K.RandomErasing(p=0.5), K.RandomGaussianNoise(p=0.5), K.RandomCrop((40, 40))]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, NaN as NaN."""
    return all(torch.equal(torch.nan_to_num(a[key], -1), torch.nan_to_num(b[key], -1)) for key in a)


@examples(8)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_sample_is_the_same_in_any_batch(order, size):
    """Alone, among others, in any order, whatever the global generators have done."""
    batch = placed(6)
    whole = rm.Augmentation(CHAIN)(batch)
    torch.manual_seed(size)
    for start in range(0, 6, size):
        rows = list(order[start : start + size])
        part = rm.Augmentation(CHAIN)({key: value[rows] for key, value in batch.items()})
        assert same(part, {key: whole[key][rows] for key in part})


def test_global_randomness_is_left_alone():
    """torch's, numpy's and Python's go on as if nothing had been."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    rm.Augmentation([*CHAIN, _Rolled()])(placed())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


class _Rolled(torch.nn.Module):
    """A module of one's own, which draws from numpy and Python."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + float(np.random.rand()) + random.random()


def test_modules_that_draw_elsewhere_are_reproducible():
    """numpy and Python are seeded too; positions, epochs, seeds and streams differ."""
    augment = rm.Augmentation([_Rolled()], turns=False)
    first = augment(placed())["image"][:, 0, 0, 0]
    assert torch.equal(first, augment(placed())["image"][:, 0, 0, 0])
    others = [
        augment(placed() | {"draw": draws(4, epoch=1)}),
        augment(placed() | {"draw": draws(4, seed=8)}),
        rm.Augmentation([_Rolled()], turns=False, seed=1)(placed()),
    ]
    values = torch.cat([first, *(other["image"][:, 0, 0, 0] for other in others)])
    assert len(values.unique()) == 16


def test_any_number_of_workers_and_any_batch_size_give_the_same(scenes):
    """Over two epochs of a real loader, by draw."""
    images = rm.RasteretDataset(scenes.images, ("B02", "B03"))
    labels = rm.RasteretDataset(scenes.labels, scenes.labels.bands, is_image=False, crs=images.crs)
    augment = rm.Augmentation(CHAIN)

    def seen(workers: int, batch_size: int) -> dict[tuple[int, ...], torch.Tensor]:
        sampler = rm.RandomAOISampler(images & labels, SIZE, 12, seed=3)
        loader = rm.DataLoader(images & labels, batch_size, sampler=sampler, num_workers=workers)
        found = {}
        for _ in range(2):
            for batch in loader:
                out = augment(rm.normalize(batch, (2000, 2000), (1000, 1000)))
                parts = torch.cat([out["image"], out["mask"][:, None].float(), out["mask_valid"].float()], dim=1)
                found |= {tuple(draw): part for draw, part in zip(out["draw"].tolist(), parts, strict=True)}
        return found

    expected = seen(0, 4)
    assert len(expected) == 24
    for workers, batch_size in ((2, 3), (0, 12)):
        again = seen(workers, batch_size)
        assert expected.keys() == again.keys()
        assert all(torch.equal(expected[draw], again[draw]) for draw in expected)


def test_turns_keep_everything_together_and_georeferenced():
    """All eight occur evenly; native uint16 turns too; each pixel keeps its ground."""
    count, size = 400, 4
    row, col = place(size)
    values = (row * size + col)[None, None].repeat(count, 1, 1, 1)
    transform = torch.tensor([10.0, 2, 500000, 1, -10, 4000000, 0, 0, 1], dtype=torch.float64).repeat(count, 1)
    batch = {"image": values.to(torch.uint16), "mask": values[:, 0], "mask_valid": values > 5, "transform": transform}
    batch["draw"] = draws(count)
    turned = rm.random_flip_rot90(batch)
    assert turned["image"].dtype == torch.uint16
    assert torch.equal(turned["image"][:, 0].long(), turned["mask"])
    assert torch.equal(turned["mask"] > 5, turned["mask_valid"][:, 0])
    kinds, counts = torch.unique(turned["mask"].flatten(1), dim=0, return_counts=True)
    assert len(kinds) == 8
    assert counts.min() > 25
    before, after = transform.reshape(-1, 3, 3), turned["transform"].reshape(-1, 3, 3)
    centres = torch.stack([col + 0.5, row + 0.5, torch.ones(size, size)]).double().flatten(1)
    ground, moved = before @ centres, after @ centres
    index = turned["mask"].flatten(1)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(moved, ground.gather(-1, index), rtol=0, atol=1e-6)
    flat = {key: value[..., :2, :] if value.ndim > 2 else value for key, value in batch.items()}
    assert rm.random_flip_rot90(flat)["image"].shape == (count, 1, 2, 4)
    assert len(torch.unique(rm.random_flip_rot90(flat)["mask"].flatten(1), dim=0)) == 4


def test_hashes_are_splitmix64():
    """Against Python's integers."""

    def mixed(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    triples = [(0, 0, 0), (7, 3, 12345), (2**63 - 1, 2, 1), (1, 10**9, 10**12)]
    for stream in (0, 5):
        found = draw_hashes({"draw": torch.tensor(triples)}, stream).tolist()
        for triple, value in zip(triples, found, strict=True):
            state = stream + 1
            for number in triple:
                state = mixed(state + number)
            assert value == state % 2**63


def test_what_cannot_be_is_refused():
    """Each with what to do."""
    with pytest.raises(UsageError, match="mixes samples"):
        rm.Augmentation([K.RandomMixUpV2()])
    with pytest.raises(UsageError, match=r"must be modules of kornia\.augmentation"):
        rm.Augmentation([lambda image: image])
    with pytest.raises(UsageError, match="samplers"):
        rm.Augmentation()({key: value for key, value in placed().items() if key != "draw"})
    with pytest.raises(UsageError, match="normalize"):
        rm.Augmentation(CHAIN)(placed() | {"image": torch.zeros(4, 2, SIZE, SIZE, dtype=torch.uint16)})
    for augment in (rm.Augmentation(), rm.Augmentation(CHAIN, turns=False)):
        with pytest.raises(UsageError, match="one size"):
            augment(placed() | {"mask": torch.zeros(4, 8, 8, dtype=torch.long)})
    with pytest.raises(UsageError, match="different sizes"):
        rm.Augmentation([K.RandomResizedCrop((8, 8), p=0.5)])(placed(12))
    with pytest.raises(UsageError, match="without labels"):
        rm.Augmentation([K.RandomThinPlateSpline(p=1.0)])(placed())
    with pytest.raises(UsageError, match="cannot hold"):
        rm.Augmentation(CHAIN)(placed() | {"mask": torch.zeros(4, SIZE, SIZE, dtype=torch.uint8)})


def test_a_warped_chip_no_longer_says_where_its_pixels_lie():
    """It says which ground was read, and neither the batch nor its tensors change."""
    batch = placed() | {"transform": torch.zeros(4, 9), "bounds": torch.arange(36.0).reshape(4, 9)}
    before = copy.deepcopy(batch)
    out = rm.Augmentation(CHAIN)(batch)
    assert "transform" not in out
    assert torch.equal(out["bounds"], before["bounds"])
    assert same(before, batch)
    assert "transform" in rm.Augmentation()(batch)


YAML = """
turns: false
ignore_index: 255
transforms:
  - class_path: kornia.augmentation.RandomAffine
    init_args: {degrees: 30, p: 1.0}
  - class_path: kornia.augmentation.RandomErasing
    init_args: {p: 1.0}
"""


def test_yaml_makes_it_in_both_manners():
    """Lightning's (jsonargparse) and Hydra's; copies and pickles are the same augmentation."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(rm.Augmentation, "augment")
    made = parser.instantiate(parser.parse_object({"augment": yaml.safe_load(YAML)})).augment
    stated = yaml.safe_load(YAML)
    stated["transforms"] = [{"_target_": m["class_path"], **m["init_args"]} for m in stated["transforms"]]
    hydra = instantiate(stated | {"_target_": "rasteret_ml.Augmentation"})
    expected = made(placed())
    assert not torch.equal(expected["image"], placed()["image"])
    assert (expected["mask"] == 255).any()
    for other in (hydra, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert same(expected, other(placed()))
