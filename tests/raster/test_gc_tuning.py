"""Python's search for cycles: less often while files are indexed and in a loader's workers, and then as it was."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import rasteret_ml as rm
from rasteret_ml.raster.worker_loop import relax_gc, relaxed_gc
from rasteret_ml.testing import make_cog


@pytest.fixture
def threshold():
    before = gc.get_threshold()
    yield gc.set_threshold
    gc.set_threshold(*before)


@pytest.mark.parametrize(("given", "meanwhile"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_it_is_rarer_and_then_as_it_was(threshold, given, meanwhile):
    threshold(given, 7, 5)
    with relaxed_gc():
        assert gc.get_threshold()[0] == meanwhile
    assert gc.get_threshold()[:2] == (given, 7)
    relax_gc()
    assert gc.get_threshold()[0] == meanwhile


def test_an_index_leaves_it_as_it_was(threshold, tmp_path):
    threshold(701, 10, 10)
    make_cog(tmp_path / "S2_20230815.tif", np.ones((1, 64, 64), np.uint8))
    rm.build(str(tmp_path / "S2_20230815.tif"), tmp_path / "c.parquet")
    assert gc.get_threshold()[0] == 701


class _Thresholds(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": torch.tensor([gc.get_threshold()[0]])}


def test_workers_search_rarely_and_the_main_process_as_before(threshold):
    threshold(702, 10, 10)
    loader = rm.DataLoader(_Thresholds(), 1, num_workers=1, multiprocessing_context="fork")
    assert [int(batch["image"]) for batch in loader] == [10_000, 10_000]
    loader.close()
    assert [int(batch["image"]) for batch in rm.DataLoader(_Thresholds(), 1)] == [702, 702]
