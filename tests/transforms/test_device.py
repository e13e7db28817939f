"""Batches to a device: order, identity, early ends and errors on the CPU; streams need a GPU."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch

import rasteret_ml as rm
from rasteret_ml.errors import DataError
from rasteret_ml.transforms.device import to_device


class Loader:
    """Counts the batches taken, and tells whether an iteration was released."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at, self.taken, self.passes = count, fails_at, 0, []

    def __iter__(self):
        one = self._pass()
        self.passes.append(weakref.ref(one))
        return one

    def _pass(self):
        for number in range(self.count):
            if number == self.fails_at:
                raise DataError("tile 3 is broken")
            self.taken += 1
            yield {
                "image": torch.full((2, 1, 4, 4), number, dtype=torch.uint16),
                "draw": torch.tensor([[0, 0, number]]),
                "name": f"batch {number}",
            }


def test_order_and_identity_on_the_cpu():
    """Tensors that need not move are the same objects; other values pass."""
    given = list(Loader(5))
    found = list(rm.device_batches(given, "cpu"))
    assert [batch["name"] for batch in found] == [f"batch {number}" for number in range(5)]
    assert all(batch["image"] is theirs["image"] for batch, theirs in zip(found, given, strict=True))


def test_batches_are_prepared_on_the_device():
    """Pixels are uint16 until then."""
    normalize = functools.partial(rm.normalize, mean=(1,), std=(2,))
    found = [batch["image"] for batch in rm.device_batches(Loader(3), torch.device("cpu"), normalize)]
    assert [float(image.mean()) for image in found] == [-0.5, 0, 0.5]
    assert all(image.dtype == torch.float32 for image in found)


def test_nothing_is_taken_before_it_is_asked_for():
    """The loader's state after a batch is exact, and leaving the loop releases the iteration."""
    loader = Loader(10)
    batches = rm.device_batches(loader, "cpu")
    assert loader.taken == 0
    for number, _ in enumerate(batches):
        assert loader.taken == number + 1
        if number == 3:
            break
    del batches
    gc.collect()
    assert loader.passes[0]() is None


def test_errors_arrive_in_their_place():
    """They follow the batches before them, unchanged."""
    loader = Loader(5, fails_at=2)
    batches = rm.device_batches(loader, "cpu")
    assert [next(batches)["name"], next(batches)["name"]] == ["batch 0", "batch 1"]
    with pytest.raises(DataError, match="tile 3"):
        next(batches)
    assert loader.taken == 2
    with pytest.raises(ZeroDivisionError):
        next(rm.device_batches(Loader(1), "cpu", lambda batch: 1 / 0))


def test_another_device_gets_tensors_in_their_types_and_draw_stays():
    """Torch's `meta` device stands in for one: it has dtypes and shapes but no pixels."""
    moved = to_device(next(iter(Loader(1))), "meta")
    assert (moved["image"].device.type, moved["image"].dtype) == ("meta", torch.uint16)
    assert moved["draw"].device.type == "cpu"
    assert moved["name"] == "batch 0"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_streams_of_a_gpu_do_not_mix_batches():
    """Each batch is complete when the caller's stream reaches it, while later ones are copied."""
    normalize = functools.partial(rm.normalize, mean=(0,), std=(1,))
    work = torch.randn(2048, 2048, device="cuda")
    sums = []
    for batch in rm.device_batches(Loader(50), "cuda", normalize):
        for _ in range(5):
            work = work @ work / work.norm()
        sums.append(batch["image"].sum())
    assert [float(value) for value in sums] == [32.0 * number for number in range(50)]
