"""`&`, `|`, collate and the loader, with TorchGeo's own parts on either side."""

from __future__ import annotations

import multiprocessing

import kornia.augmentation as K
import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import torchgeo.datasets
import torchgeo.samplers
from torch.utils.data import DataLoader as TorchLoader
from torchgeo.datasets import RasterDataset, random_bbox_assignment, roi_split

import rasteret_ml as rm
from rasteret_ml.errors import NoOverlapError, UsageError

BANDS = ("B02", "B03")
REMAP = {1: 0, 2: 1, 3: 2, 4: 3}


def tensors(batch):
    """Bytes of everything in a batch, to compare whole batches."""
    return {k: (str(v.dtype), tuple(v.shape), v.numpy().tobytes()) for k, v in batch.items()}


@pytest.fixture
def images(scenes):
    return rm.RasteretDataset(scenes.images, BANDS)


@pytest.fixture
def labels(scenes):
    return rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, labels={"remap": REMAP})


def test_images_and_labels_line_up(scenes, images, labels):
    """Same chip, validities by AND, one batch read together."""
    both = images & labels
    sampler = rm.RandomAOISampler(both, 64, 12, seed=3)
    for sample in both.__getitems__(list(sampler)):
        t = sample["transform"]
        col, row = round((t[2].item() - 500000) / 10), round((5000000 - t[5].item()) / 10)
        stored = scenes.cover[row : row + 64, col + 1 : col + 65].astype(int)
        np.testing.assert_array_equal(sample["mask"].numpy(), np.where(stored == 0, -100, stored - 1))
        assert not (sample["mask_valid"][0].numpy() & (stored == 0)).any()


def test_the_right_side_keeps_its_own_crs_and_resolution(images, labels):
    """TorchGeo changes the right operand; ours works on a copy."""
    coarse = rm.RasteretDataset(labels.collection, ["B1"], is_image=False, res=50)
    assert (images & coarse).res == (10.0, 10.0)
    assert coarse.res == (50.0, 50.0)


def test_two_image_datasets_join_along_channels(scenes, images):
    """And three do, with batching kept."""
    one = rm.RasteretDataset(scenes.images, ["B02"])
    joined = images & one & one
    sample = joined[next(iter(rm.RandomAOISampler(joined, 32, 1)))]
    assert sample["image"].shape == (4, 32, 32)
    assert sample["mask_valid"].shape == (1, 32, 32)
    assert hasattr(joined, "__getitems__")


def test_union_fills_by_validity(scenes):
    """Gaps of the left side come from the right one; maximum has no say."""
    new = rm.RasteretDataset(scenes.images.where(pc.field("id") == "S_20230811"), BANDS)
    old = rm.RasteretDataset(scenes.images.where(pc.field("id") == "S_20230801"), BANDS)
    east = rm.RasteretDataset(scenes.images.where(pc.field("id") == "E_20230805"), BANDS)
    union = new | old | east
    x, y, _ = union.bounds
    got = union[x, y]["image"].numpy()
    everything = rm.RasteretDataset(scenes.images, BANDS)[x, y]["image"].numpy()
    np.testing.assert_array_equal(got, everything)
    with pytest.raises(NoOverlapError):
        union[0:100, 0:100]


class Stock(RasterDataset):
    """TorchGeo's own reader of the same files."""

    filename_glob = "S_20230801_B02.tif"
    is_image = True

    def __getitem__(self, query):
        sample = super().__getitem__(query)
        sample["stock"] = sample.pop("image")
        return sample


def test_a_stock_dataset_on_the_right_gets_our_snapped_chip(scenes, images):
    """Its pixels lie where ours do."""
    both = images & Stock(str(scenes.folder))
    for aoi in rm.RandomAOISampler(both, 48, 5, seed=2):
        sample = both[aoi]
        t = sample["transform"]
        col, row = round((t[2].item() - 500000) / 10), round((5000000 - t[5].item()) / 10)
        expected = scenes.old[0, row : row + 48, col : col + 48].astype(np.float32)
        np.testing.assert_array_equal(sample["stock"][0].numpy(), expected)


def test_a_stock_dataset_on_the_left_understands_our_aois(scenes, images):
    """An AOI is a tuple of three slices."""
    both = Stock(str(scenes.folder)) & rm.RasteretDataset(scenes.images, BANDS)
    sample = both[next(iter(rm.RandomAOISampler(both, 48, 1)))]
    assert sample["image"].shape == (2, 48, 48)
    assert sample["stock"].shape == (1, 48, 48)


@pytest.mark.filterwarnings("ignore:Use .* instead:DeprecationWarning")
def test_stock_samplers_and_splitters_work(images, labels):
    """TorchGeo's samplers over ours and over `&`; its splitters assign new indexes."""
    both = images & labels
    for dataset in (images, both):
        for sampler in (
            torchgeo.samplers.RandomGeoSampler(dataset, 64, length=5),
            torchgeo.samplers.GridGeoSampler(dataset, 100, 100),
        ):
            queries = list(sampler)
            assert queries
            assert all(s["image"].shape[0] == 2 for s in dataset.__getitems__(queries))
    parts = random_bbox_assignment(images, [2, 1], generator=torch.Generator().manual_seed(0))
    assert sum(len(p) for p in parts) == len(images)
    for part in parts:
        x, y, _ = part.bounds
        assert part[x.start : x.start + 320, y.start : y.start + 320]["image"].shape == (2, 32, 32)
    import shapely

    x, y, _ = images.bounds
    (half,) = roi_split(images, [shapely.box(x.start, y.start, x.start + 1000, y.stop)])
    assert half.bounds[0].stop == x.start + 1000


@pytest.mark.skipif(
    not hasattr(torchgeo.samplers, "RandomPatchSampler"), reason="TorchGeo's new samplers came with 0.10"
)
def test_new_stock_samplers_work(images):
    """They yield two slices, without a time."""
    sampler = torchgeo.samplers.RandomPatchSampler(images, size=64, length=4)
    assert all(images[query]["image"].shape == (2, 64, 64) for query in sampler)


def test_label_conflicts_are_refused(labels):
    """Two masks need names."""
    both = labels & labels
    with pytest.raises(UsageError, match="mask"):
        both[next(iter(rm.RandomAOISampler(both, 16, 1)))]


def test_collate_is_native_and_pads_ragged_chips_as_invalid(images, labels):
    """uint16 stays; padding is invalid, ignored or NaN."""
    both = images & labels
    small = both[next(iter(rm.RandomAOISampler(both, (20, 30), 1)))]
    large = both[next(iter(rm.RandomAOISampler(both, (40, 24), 1)))]
    batch = rm.collate([small, large])
    assert batch["image"].dtype == torch.uint16
    assert batch["image"].shape == (2, 2, 40, 30)
    assert torch.equal(batch["image"][0, :, :20, :30], small["image"])
    assert not batch["mask_valid"][0, :, 20:].any()
    assert (batch["mask"][1, :, 24:] == -100).all()
    assert batch["bounds"].shape == (2, 9)
    assert batch["bounds"].dtype == torch.float64
    assert all(isinstance(v, torch.Tensor) for v in batch.values())


def test_collate_squeezes_identity_and_refuses_different_keys(images):
    """`aoi` becomes [B]; a key that one sample lacks is named."""
    x, y, _ = images.bounds
    import shapely

    aois = [shapely.box(x.start, y.start, x.start + 900, y.start + 900)]
    sampler = rm.RandomAOISampler(images, 16, 3, aois=aois, aois_crs=images.crs)
    samples = images.__getitems__(list(sampler))
    assert rm.collate(samples)["aoi"].tolist() == [0, 0, 0]
    with pytest.raises(UsageError, match="aoi"):
        rm.collate([samples[0], {k: v for k, v in samples[1].items() if k != "aoi"}])


def test_every_pass_of_the_loader_is_another_epoch(images):
    """Unless one is set; the same epoch gives the same batches."""
    sampler = rm.RandomAOISampler(images, 32, 8, seed=1)
    loader = rm.DataLoader(images, 4, sampler=sampler)
    first, second = [tensors(b) for b in loader], [tensors(b) for b in loader]
    assert first != second
    sampler.set_epoch(0)
    assert [tensors(b) for b in loader] == first
    assert [tensors(b) for b in loader] == second
    assert len(loader) == 2


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("forkserver", "spawn"))]
)
def test_the_same_batches_whatever_the_workers(images, labels, method):
    """Byte for byte, with two workers of each start method, also after a read in the parent."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    both = images & labels
    sampler = rm.RandomAOISampler(both, 48, 12, seed=9)
    expected = [tensors(batch) for batch in rm.DataLoader(both, 4, sampler=sampler)]  # reads in this process
    sampler.set_epoch(0)
    loader = rm.DataLoader(both, 4, sampler=sampler, num_workers=2, multiprocessing_context=method)
    assert [tensors(batch) for batch in loader] == expected
    sampler.set_epoch(0)
    assert [tensors(batch) for batch in loader] == expected
    both[next(iter(sampler))]  # and the parent still reads


def test_torchs_own_loader_works_too(images):
    """With our collate, and nothing else of ours."""
    sampler = rm.RandomAOISampler(images, 32, 6)
    batches = list(TorchLoader(images, 3, sampler=sampler, collate_fn=rm.collate))
    assert [b["image"].shape for b in batches] == [(3, 2, 32, 32)] * 2


def test_an_error_in_a_worker_keeps_its_type_and_message(images):
    """torch rebuilds it from its text."""
    sampler = [(slice(0, 320), slice(0, 320), images.bounds[2])] * 2
    with pytest.raises(NoOverlapError, match="No record at"):
        list(rm.DataLoader(images, 1, sampler=sampler, num_workers=1))


def test_kornia_flips_validity_with_the_image(images):
    """The `mask` prefix is what it goes by."""
    batch = rm.collate(images.__getitems__(list(rm.RandomAOISampler(images, 32, 2, seed=4))))
    batch = {"image": batch["image"].float(), "mask_valid": batch["mask_valid"]}
    flipped = K.AugmentationSequential(K.RandomHorizontalFlip(p=1.0), data_keys=None)(batch)
    assert torch.equal(flipped["image"], batch["image"].flip(-1))
    assert torch.equal(flipped["mask_valid"].bool(), batch["mask_valid"].flip(-1))
