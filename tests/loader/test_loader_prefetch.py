"""Looking ahead, caching and sharing buffers change when pixels are read and where they lie, never what they are."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import torch.utils.data
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.errors import NoOverlapError, ReadError, UsageError
from rasteret_ml.loader.prefetch import BatchIndices, Hints, PrefetchingDataset
from rasteret_ml.ranges import ByteRange
from rasteret_ml.raster.worker_loop import current_loop
from rasteret_ml.storage.local import LocalReader
from rasteret_ml.testing import RangeServer, make_cog

BANDS = ("B02", "B03")
CONTEXTS = ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)]


class Backend:
    """Counts what is read; pickles without its counts."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    async def get_range(self, url: str, start: int, length: int) -> bytes:
        """As rasteret's backends."""
        self.calls.append((url, start, length))
        response = await LocalReader().read(url, ByteRange(start, length))
        return bytes(response.data)


def _images(scenes: Any, **options: Any) -> rm.RasteretDataset:
    return rm.RasteretDataset(scenes.images, BANDS, **options)


def _labelled(scenes: Any, **options: Any) -> Any:
    labels = rm.RasteretDataset(
        scenes.labels, ["B1"], is_image=False, labels={"remap": {1: 0, 2: 1, 3: 2, 4: 3}}, **options
    )
    return _images(scenes, sample={"mask_aoi": True}, **options) & labels


def _slow(dataset: Any, sampler: Any, batch_size: int) -> list[Any]:
    """One query at a time, collated by torch's own stacking."""
    samples = [dataset[aoi] for aoi in sampler]
    return [rm.collate(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


def _assert_equal(batches: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert set(batch) == set(other)
        for key, value in batch.items():
            assert value.dtype == other[key].dtype, key
            assert value.shape == other[key].shape, key
            assert value.numpy().tobytes() == other[key].numpy().tobytes(), key


@examples(25, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lookahead=st.integers(0, 5),
    cache=st.sampled_from([0, 40_000, 10**8]),
    batch_size=st.integers(1, 5),
    size=st.sampled_from([16, 100, 150]),
    seed=st.integers(0, 5),
    limit=st.sampled_from([0, 200_000, 10**9]),
    labelled=st.booleans(),
)
def test_samples_are_those_of_the_slow_path(
    scenes: Any, lookahead: int, cache: int, batch_size: int, size: int, seed: int, limit: int, labelled: bool
) -> None:
    """In one process: any depth, bound, cache and batch size; twice over, as epochs are."""
    make = _labelled if labelled else _images
    slow, fast = make(scenes), make(scenes, reading={"cache_bytes": cache})
    sampler = rm.RandomAOISampler(fast, size, 9, seed=seed)
    loader = rm.DataLoader(fast, batch_size, sampler=sampler, lookahead=lookahead, lookahead_bytes=limit)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(loader)
        _assert_equal(batches, _slow(slow, sampler, batch_size))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("lookahead", "cache"), [(0, 0), (3, 0), (3, 10**8)])
def test_workers_give_the_samples_of_the_slow_path(scenes: Any, context: str, lookahead: int, cache: int) -> None:
    """Two workers, every start method, two epochs with the workers kept."""
    dataset = _labelled(scenes, reading={"cache_bytes": cache})
    sampler = rm.RandomAOISampler(dataset, 64, 22, seed=3)
    loader = rm.DataLoader(
        dataset, 4, sampler=sampler, num_workers=2, multiprocessing_context=context, lookahead=lookahead
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(loader)
        _assert_equal(batches, _slow(_labelled(scenes), sampler, 4))
        assert all(batch["image"].is_shared() for batch in batches)
    total = loader.stats().total
    assert total.batches_prefetched == (6 - 2 if lookahead else 0)  # all but each worker's first
    assert total.tiles_decoded > 0


def test_ragged_batches_and_transforms_are_stacked_as_ever(scenes: Any) -> None:
    """What is not one buffer is padded or stacked; transforms see views that they may change."""

    def brighten(sample: Any) -> Any:
        sample["image"][0] = 7
        return sample | {"mask_valid": ~sample["mask_valid"]}

    plain, dataset = _images(scenes), _images(scenes, transforms=brighten)
    x, y, t = plain.bounds
    queries = [(slice(x.start, x.start + 10 * n), slice(y.stop - 10 * n, y.stop), t) for n in (20, 20, 30)]
    for chosen in ([0, 1], [1, 2]):
        (batch,) = rm.DataLoader(dataset, 2, sampler=[queries[i] for i in chosen])
        (other,) = rm.DataLoader(plain, 2, sampler=[queries[i] for i in chosen])
        inside = [30 if 2 in chosen else 20] * 2
        assert batch["image"].shape == (2, 2, *inside)
        assert (batch["image"][0, 0, :20, :20] == 7).all()
        assert torch.equal(batch["image"][:, 1], other["image"][:, 1])
        assert torch.equal(batch["mask_valid"][:, :, :20, :20], ~other["mask_valid"][:, :, :20, :20])


def test_collating_copies_nothing(scenes: Any) -> None:
    """The batch is the memory that the tiles were pasted into, also through `&`."""
    for dataset, keys in ((_images(scenes), ["image", "mask_valid"]), (_labelled(scenes), ["image", "mask"])):
        queries = list(rm.RandomAOISampler(dataset, 32, 4, seed=1))
        samples = dataset.__getitems__(queries)
        batch = rm.collate(samples)
        for key in keys:
            assert batch[key].data_ptr() == samples[0][key].data_ptr(), key
            assert torch.equal(batch[key], torch.stack([sample[key] for sample in samples]))
        shuffled = rm.collate(samples[::-1])
        assert torch.equal(shuffled["image"], batch["image"].flip(0))
        part = rm.collate(samples[1:3])
        assert torch.equal(part["image"], batch["image"][1:3])


def _hints(number: int, ahead: Sequence[tuple[int, list[Any]]] = (), *, epoch: int = 0) -> Hints:
    return Hints(epoch=epoch, number=number, ahead=tuple(ahead))


def test_a_wrong_hint_costs_bytes_but_never_a_wrong_sample(scenes: Any) -> None:
    """Other queries than told, a batch that never comes, another epoch, a place without data."""
    dataset = _images(scenes)
    prefetching = PrefetchingDataset(dataset, 10**9, None)
    a, b, c, d = (list(rm.RandomAOISampler(dataset, 40, 3, seed=s)) for s in range(4))
    nowhere = [(slice(0.0, 400.0, 10.0), slice(0.0, 400.0, 10.0), slice(*(dataset.bounds[2].start,) * 2, 1))]

    def read(batch: list[Any], hints: Hints) -> Any:
        return rm.collate(prefetching.__getitems__(BatchIndices(batch, hints)))

    def right(batch: list[Any]) -> Any:
        return rm.collate([dataset[query] for query in batch])

    steps = [
        (a, _hints(0, [(1, b), (2, c), (3, nowhere), (4, d)])),
        (d, _hints(1)),  # told of b
        (c, _hints(4, [(5, a)])),  # 2 and 3 never come, and 4 was told as d
        (a, _hints(5, epoch=1)),  # another epoch
        (b, _hints(0, epoch=2)),  # numbers start again
    ]
    for batch, hints in steps:
        _assert_equal([read(batch, hints)], [right(batch)])
    read(a, _hints(1, [(2, nowhere)], epoch=3))
    with pytest.raises(NoOverlapError):
        read(nowhere, _hints(2, epoch=3))


def test_a_dataset_that_changes_is_read_anew(scenes: Any) -> None:
    """Another resolution or index between telling and asking: what was read ahead is of no use."""
    dataset = _images(scenes)
    prefetching = PrefetchingDataset(dataset, 10**9, None)
    a, b = (list(rm.RandomAOISampler(dataset, 40, 3, seed=s)) for s in range(2))
    free = [tuple(slice(part.start, part.stop) for part in query) for query in b]
    prefetching.__getitems__(BatchIndices(a, _hints(0, [(1, free)])))
    dataset.res = 20.0
    got = rm.collate(prefetching.__getitems__(BatchIndices(free, _hints(1))))
    _assert_equal([got], [rm.collate([dataset[query] for query in free])])
    assert got["image"].shape[-1] == 20
    whole = dataset.index
    dataset.index = whole.iloc[:1]
    places = list(rm.RandomAOISampler(dataset, 20, 3, seed=5))
    prefetching.__getitems__(BatchIndices(places, _hints(2, [(3, places)])))
    dataset.index = whole
    got = rm.collate(prefetching.__getitems__(BatchIndices(places, _hints(3))))
    _assert_equal([got], [rm.collate([dataset[query] for query in places])])


def test_reading_ahead_is_bounded_in_bytes(scenes: Any) -> None:
    """One batch ahead in any case; more only while they fit; nothing where it is off."""
    for lookahead, limit, batches in ((4, 0, 2), (4, 2 * 4 * 64 * 64 * 2 * 3, 3), (4, 10**9, 5), (0, 10**9, 1)):
        backend = Backend()
        east = scenes.images.where(pc.starts_with(pc.field("id"), "E_"))  # no gaps, so that explain is exact
        dataset = rm.RasteretDataset(east, BANDS, reading={"backend": backend, "max_concurrent": 1000})
        queries = list(rm.RandomAOISampler(dataset, 64, 40, seed=1))
        most = [dataset.explain(queries[i : i + 4]) for i in range(0, 40, 4)]
        iterator = iter(rm.DataLoader(dataset, 4, sampler=queries, lookahead=lookahead, lookahead_bytes=limit))
        next(iterator)
        current_loop().wait(current_loop().start(_settled()))
        read = sum(length for _, _, length in backend.calls)
        at_most = sum(estimate.bytes_fetched for estimate in most[:batches])
        at_least = dataset.explain(queries[: 4 * batches]).bytes_wanted  # tiles that batches share are read once
        assert at_least <= read <= at_most, (limit, batches)
        del iterator


async def _settled() -> None:
    """When everything else on the loop has ended."""
    own = asyncio.current_task()
    while others := [task for task in asyncio.all_tasks() if task is not own]:
        await asyncio.wait(others)


def test_a_pass_that_is_left_cancels_what_it_read_ahead(scenes: Any) -> None:
    """Leaving the loop early leaves nothing running and nothing to complain of; the next pass is whole."""
    dataset = _images(scenes)
    sampler = rm.RandomAOISampler(dataset, 64, 20, seed=1)
    loader = rm.DataLoader(dataset, 2, sampler=sampler, lookahead=5)
    for _ in loader:
        break
    gc.collect()
    current_loop().wait(current_loop().start(_settled()))
    sampler.set_epoch(0)
    expected = _slow(_images(scenes), sampler, 2)
    sampler.set_epoch(0)
    _assert_equal(list(loader), expected)


def test_two_loaders_over_one_dataset_do_not_mix(scenes: Any) -> None:
    """Interleaved passes in one process, as training and validation may be."""
    dataset = _images(scenes)
    samplers = [rm.RandomAOISampler(dataset, 48, 12, seed=s) for s in (1, 2)]
    loaders = [rm.DataLoader(dataset, 3, sampler=s, lookahead=3) for s in samplers]
    pairs = list(zip(*loaders, strict=True))
    for i, sampler in enumerate(samplers):
        _assert_equal([pair[i] for pair in pairs], _slow(_images(scenes), sampler, 3))


def test_torch_own_loader_and_a_stock_dataset_need_no_hints(scenes: Any) -> None:
    """Ours in torch's loader, and another dataset in our loader."""
    dataset = _images(scenes)
    sampler = rm.RandomAOISampler(dataset, 32, 4, seed=1)
    (theirs,) = torch.utils.data.DataLoader(dataset, 4, sampler=sampler, collate_fn=rm.collate)
    _assert_equal([theirs], _slow(dataset, sampler, 4))
    numbers = torch.utils.data.TensorDataset(torch.arange(10))
    loader = rm.DataLoader(numbers, 4, collate_fn=None)
    assert [batch[0].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(loader) == 3
    assert [int(item[0]) for item in rm.DataLoader(numbers, None, collate_fn=None)] == list(range(10))


class _Marked(rm.RasteretDataset):
    """Adds a key to each sample of a batch."""

    def __getitems__(self, queries: Sequence[Any]) -> list[Any]:
        """Mark the samples."""
        return [sample | {"marked": torch.tensor([1])} for sample in super().__getitems__(queries)]


def test_a_subclass_may_override_how_a_batch_is_read(scenes: Any) -> None:
    """Its `__getitems__` is called, and batches are prefetched all the same."""
    dataset = _Marked(scenes.images, BANDS)
    sampler = rm.RandomAOISampler(dataset, 32, 8, seed=1)
    loader = rm.DataLoader(dataset, 2, sampler=sampler)
    assert all("marked" in batch for batch in loader)
    assert loader.stats().total.batches_prefetched == 3


def _configure(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert isinstance(info.dataset, rm.RasteretDataset)
    info.dataset.transforms = lambda sample: sample | {"worker": torch.tensor([worker + 7])}


def test_a_worker_init_function_configures_the_loaders_own_dataset(scenes: Any) -> None:
    """`get_worker_info().dataset` is the dataset that the loader was given, as with torch's."""
    dataset = _images(scenes)
    sampler = rm.RandomAOISampler(dataset, 32, 4, seed=1)
    options = {"num_workers": 1, "multiprocessing_context": "fork", "worker_init_fn": _configure}
    (batch,) = rm.DataLoader(dataset, 4, sampler=sampler, **options)
    assert batch["worker"].unique().tolist() == [7]


def test_an_error_is_raised_for_the_batch_that_has_it(tmp_path: Path) -> None:
    """A broken tile ahead does not spoil the batches before it, nor those after."""
    data = np.random.default_rng(3).integers(1, 999, (1, 64, 256), np.uint16)
    path = Path(make_cog(tmp_path / "a.tif", data, blocksize=64, overviews="none", compress="deflate"))
    dataset = rm.RasteretDataset(rm.build(str(path), tmp_path / "a.parquet"), ["B1"])
    table = next(iter(dataset.collection.iterate_records())).band_metadata["B1_metadata"]
    offset = int(table["tile_offsets"][2])
    stamp = path.stat()
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    x, y, t = dataset.bounds
    queries = [
        (slice(x.start + 640 * i, x.start + 640 * i + 640, 10.0), slice(y.start, y.stop, 10.0), t) for i in range(4)
    ]
    iterator = iter(rm.DataLoader(dataset, 1, sampler=queries, lookahead=3))
    assert torch.equal(next(iterator)["image"][0, 0], torch.from_numpy(data[0, :, :64]))
    assert torch.equal(next(iterator)["image"][0, 0], torch.from_numpy(data[0, :, 64:128]))
    with pytest.raises(ReadError, match="tile 2"):
        next(iterator)
    assert torch.equal(next(iterator)["image"][0, 0], torch.from_numpy(data[0, :, 192:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_stats_say_what_the_server_counted(server: RangeServer, tmp_path: Path, workers: int) -> None:
    """Requests and bytes by worker and summed, of the present pass alone; explain says the same before."""
    rng = np.random.default_rng(2)
    for name in "ab":
        make_cog(tmp_path / f"{name}.tif", rng.integers(0, 65535, (1, 256, 256), np.uint16), blocksize=64)
    collection = rm.build([f"{server.url}/{name}.tif" for name in "ab"], tmp_path / "c.parquet", datetime=None)
    dataset = rm.RasteretDataset(collection.where(pc.field("id") == "a"), ["B1"])
    queries = list(rm.RandomAOISampler(dataset, 64, 24, seed=4))
    loader = rm.DataLoader(dataset, 4, sampler=queries, num_workers=workers, lookahead=0)
    for _ in range(2):
        server.requests.clear()
        for _ in loader:
            pass
        stats = loader.stats()
        estimates = [dataset.explain(queries[i : i + 4]) for i in range(0, 24, 4)]
        assert stats.batches == 6
        assert len(stats.workers) == max(1, workers)
        assert stats.total.requests == len(server.requests) == sum(e.requests for e in estimates)
        assert stats.total.bytes_fetched == sum(r.sent for r in server.requests)
        assert stats.total.bytes_fetched == sum(e.bytes_fetched for e in estimates)
        assert stats.total.bytes_used == sum(e.bytes_wanted for e in estimates)
        assert stats.total.tiles_decoded == sum(e.tiles for e in estimates)
        assert stats.total.merge_waste == stats.total.bytes_fetched - stats.total.bytes_used >= 0
        assert stats.total.chips == 24
        assert stats.waiting_seconds >= stats.first_seconds > 0
        assert stats.total.decode_seconds > 0
        assert 0 <= stats.wait_share <= 1
        if workers:
            assert all(worker.chips == 12 for worker in stats.workers)


def test_bad_arguments_are_refused(scenes: Any) -> None:
    """Negative depths, bounds and caches."""
    dataset = _images(scenes)
    with pytest.raises(UsageError, match="lookahead"):
        rm.DataLoader(dataset, lookahead=-1)
    with pytest.raises(UsageError, match="lookahead_bytes"):
        rm.DataLoader(dataset, lookahead_bytes=-1)
    with pytest.raises(UsageError, match="cache_bytes"):
        _images(scenes, reading={"cache_bytes": -1})


def test_a_loader_that_is_dropped_ends_its_workers(scenes: Any) -> None:
    """At once, by counting references: nothing that it made holds it."""
    dataset = _images(scenes)
    loader = rm.DataLoader(dataset, 2, sampler=rm.RandomAOISampler(dataset, 32, 8, seed=1), num_workers=2)
    assert len(list(loader)) == 4
    workers = multiprocessing.active_children()
    alive = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert alive() is None
    finally:
        gc.enable()
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()


class _Spying:
    """A collate function that says whether every sample's image and validity are rows of one buffer."""

    def __call__(self, samples: Any) -> Any:
        batch = rm.collate(samples)
        rows = [batch[key].data_ptr() == samples[0][key].data_ptr() for key in ("image", "mask_valid")]
        return batch | {"one": torch.tensor(rows)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_hands_over_the_very_buffer(scenes: Any, workers: int) -> None:
    """In shared memory, without a second copy."""
    dataset = _images(scenes)
    sampler = rm.RandomAOISampler(dataset, 32, 8, seed=1)
    for batch in rm.DataLoader(dataset, 4, sampler=sampler, num_workers=workers, collate_fn=_Spying()):
        assert batch["one"].all()


def test_what_is_stacked_in_a_worker_is_one_piece_of_memory(scenes: Any) -> None:
    """Torch opens a connection for each piece; the values are those that a loader without workers gives."""
    dataset = _images(scenes)
    sampler = rm.RandomAOISampler(dataset, 32, 8, seed=1)
    alone = list(rm.DataLoader(dataset, 4, sampler=sampler))
    sampler = rm.RandomAOISampler(dataset, 32, 8, seed=1)
    for batch, expected in zip(rm.DataLoader(dataset, 4, sampler=sampler, num_workers=1), alone, strict=True):
        stacked = [key for key in batch if not key.startswith(("image", "mask"))]
        assert len({batch[key].dtype for key in stacked}) > 1
        assert len({batch[key].untyped_storage().data_ptr() for key in stacked}) == 1
        for key in stacked:
            assert batch[key].dtype == expected[key].dtype
            assert torch.equal(batch[key].nan_to_num(-7), expected[key].nan_to_num(-7)), key


def test_lazy_views_are_not_mistaken_for_the_buffer() -> None:
    """A conjugate shares the memory and means other numbers."""
    whole = torch.randn(3, 1, 2, 2, dtype=torch.complex64)
    batch = rm.collate([{"image": row.conj()} for row in whole])
    assert torch.equal(batch["image"], whole.conj())


def test_a_batch_sampler_may_use_its_list_again_and_counts_epochs(scenes: Any) -> None:
    """What is told ahead is a copy; the sampler inside has its epochs."""

    class Reusing(torch.utils.data.BatchSampler):
        def __iter__(self) -> Any:
            held: list[Any] = []
            for batch in super().__iter__():
                held[:] = batch
                yield held
                held.clear()

    dataset = _images(scenes)
    sampler = rm.RandomAOISampler(dataset, 32, 8, seed=1)
    loader = rm.DataLoader(dataset, batch_sampler=Reusing(sampler, 2, False), lookahead=2)
    passes = [torch.cat([batch["bounds"] for batch in loader]) for _ in range(2)]
    assert len(passes[0]) == 8
    assert not torch.equal(*passes)
