"""One loop per process: refusals, forks, exits."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from rasteret_ml.errors import ClosedError
from rasteret_ml.raster.engine import gather_or_cancel
from rasteret_ml.raster.worker_loop import WorkerLoop, current_loop, decode_threads


async def answer() -> int:
    """Something to run."""
    return 42


def run(loop: WorkerLoop, work: Coroutine[Any, Any, Any]) -> Any:
    """Start and wait."""
    return loop.wait(loop.start(work))


def test_runs_and_is_shared():
    """The process has one."""
    assert run(current_loop(), answer()) == 42
    assert current_loop() is current_loop()


def test_close_is_idempotent_and_final():
    """A closed loop says so; the process then makes another."""
    loop = WorkerLoop(1)
    assert run(loop, answer()) == 42
    loop.close()
    loop.close()
    with pytest.raises(ClosedError, match="closed"):
        run(loop, answer())
    assert run(current_loop(), answer()) == 42


def test_it_refuses_to_wait_for_itself():
    """Called from its own thread it would hang."""
    loop = current_loop()

    async def nested(running: WorkerLoop) -> str:
        try:
            run(running, answer())
        except ClosedError as error:
            return str(error)
        return "it ran"

    assert "wait for itself" in run(loop, nested(loop))


def test_errors_come_through():
    """As they are."""

    async def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(current_loop(), fail())


def test_the_first_failure_cancels_the_others():
    """And is raised as itself, not in a group."""
    cancelled = []

    async def wait_forever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fail() -> None:
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        run(current_loop(), gather_or_cancel([wait_forever(), fail()]))
    assert cancelled == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_makes_its_own():
    """The parent's threads are not there; the parent goes on as before."""
    run(current_loop(), answer())
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if run(current_loop(), answer()) == 42 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert run(current_loop(), answer()) == 42


def test_decode_threads_are_shared_out():
    """Never none."""
    assert decode_threads(10_000) == 1
    assert decode_threads(1) >= decode_threads(2) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
def test_a_forgotten_loop_lets_the_interpreter_end(tmp_path: Path, ending: str):
    """With a session open and warnings as errors."""
    code = (
        "import asyncio, pathlib, sys\n"
        "from rasteret_ml.raster.engine import ReadConfig\n"
        "from rasteret_ml.ranges import ByteRange\n"
        "from rasteret_ml.raster.worker_loop import current_loop\n"
        "from rasteret_ml.testing import RangeServer\n"
        "pathlib.Path(sys.argv[1], 'f').write_bytes(b'x' * 100)\n"
        "with RangeServer(sys.argv[1]) as server:\n"
        "    loop = current_loop()\n"
        "    read = loop.engine(ReadConfig()).reader.read(server.url + '/f', ByteRange(0, 10))\n"
        "    assert loop.wait(loop.start(read)).data == b'x' * 10\n"
    ) + ending
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (3 if ending else 0), done.stderr
    assert done.stderr == ""
