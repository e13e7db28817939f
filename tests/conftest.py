"""Fixtures for every room: real data where it lies beside the checkout, a loopback server, small scenes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rasteret_ml.testing import RangeServer

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of tile tables go to a folder of the test run, in child processes as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RASTERET_ML_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rasters; the test is skipped, with its reason, where it is absent."""
    if not _SHARED.is_dir():
        pytest.skip(f"no real data at {_SHARED}")
    return _SHARED


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded randomness."""
    return np.random.default_rng(0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """A range server over `tmp_path`."""
    with RangeServer(tmp_path) as running:
        yield running
