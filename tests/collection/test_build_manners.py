"""How a build behaves: event loops, progress bar, limits, output paths, hooks."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.testing import RangeServer, make_cog


def _cog(path: Path) -> str:
    return make_cog(path, np.ones((1, 16, 16), np.uint8))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with three rasters."""
    for name in "abc":
        _cog(tmp_path / "in" / f"{name}.tif")
    return tmp_path / "in"


def test_build_works_inside_a_running_loop(three: Path) -> None:
    """As in Jupyter, where one is always running."""

    async def cell() -> int:
        return len(build(str(three), three / "c.parquet"))

    assert asyncio.run(cell()) == 3


def test_errors_come_out_of_a_running_loop_unchanged(tmp_path: Path) -> None:
    """Not wrapped, not lost in a thread."""

    async def cell() -> None:
        build(str(tmp_path / "no.tif"), tmp_path / "c.parquet")

    with pytest.raises(DataError, match=r"no\.tif: no such file"):
        asyncio.run(cell())


@pytest.mark.parametrize(("shown", "expected"), [(True, "3/3"), (False, "")])
def test_the_progress_bar(three: Path, capsys: pytest.CaptureFixture[str], shown: bool, expected: str) -> None:
    """Only if requested, and never on stdout."""
    build(str(three), three / "c.parquet", progress=shown)
    printed = capsys.readouterr()
    assert expected in printed.err
    assert bool(printed.err) == shown
    assert printed.out == ""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Fail instead of hanging."""

    def ring(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("bound", [0, -1])
def test_max_concurrent_is_at_least_one(three: Path, bound: int) -> None:
    """Zero would wait for ever."""
    with _at_most(1.5), pytest.raises(UsageError, match="max_concurrent"):
        build(str(three), three / "c.parquet", max_concurrent=bound)


def test_the_output_path_is_checked_before_reading(server: RangeServer, tmp_path: Path) -> None:
    """Hours of reading must not end in "choose another name"."""
    _cog(tmp_path / "a.tif")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("years of work")
    with pytest.raises(UsageError, match="mine"):
        build(f"{server.url}/a.tif", tmp_path / "mine")
    assert server.requests == []


def test_an_error_in_the_sign_hook_reaches_the_caller(three: Path) -> None:
    """It is raised or reported, not wrapped in nested exception groups."""

    def sign(href: str) -> str:
        raise KeyError("no such profile")

    with pytest.raises((KeyError, DataError), match="no such profile"):
        build(str(three), three / "c.parquet", sign=sign)
