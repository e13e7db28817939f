"""One loop per process: refusals, forks, exits."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rasteret_ml.errors import ClosedError
from rasteret_ml.raster.execute import gather_or_cancel
from rasteret_ml.raster.worker_loop import WorkerLoop, current_loop, decode_threads


async def answer(loop: WorkerLoop) -> int:
    """Something to run."""
    return 42


def test_runs_and_is_shared():
    """The process has one."""
    assert current_loop().run(answer) == 42
    assert current_loop() is current_loop()


def test_close_is_idempotent_and_final():
    """A closed loop says so; the process then makes another."""
    loop = WorkerLoop(1)
    assert loop.run(answer) == 42
    loop.close()
    loop.close()
    with pytest.raises(ClosedError, match="closed"):
        loop.run(answer)
    assert current_loop().run(answer) == 42


def test_it_refuses_to_wait_for_itself():
    """Called from its own thread it would hang."""
    loop = current_loop()

    async def nested(running: WorkerLoop) -> str:
        try:
            running.run(answer)
        except ClosedError as error:
            return str(error)
        return "it ran"

    assert "wait for itself" in loop.run(nested)


def test_errors_come_through():
    """As they are."""

    async def fail(loop: WorkerLoop) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        current_loop().run(fail)


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
        current_loop().run(lambda loop: gather_or_cancel([wait_forever(), fail()]))
    assert cancelled == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_makes_its_own():
    """The parent's threads are not there; the parent goes on as before."""
    current_loop().run(answer)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if current_loop().run(answer) == 42 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert current_loop().run(answer) == 42


def test_decode_threads_are_shared_out():
    """Never none."""
    assert decode_threads(10_000) == 1
    assert decode_threads(1) >= decode_threads(2) >= 1


@pytest.mark.parametrize("ending", ["", pytest.param("raise SystemExit(3)", marks=pytest.mark.slow)])
def test_a_forgotten_loop_lets_the_interpreter_end(tmp_path: Path, ending: str):
    """With a session open and warnings as errors."""
    code = (
        "import asyncio, pathlib, sys\n"
        "from rasteret_ml.storage.limits import FetchLimits\n"
        "from rasteret_ml.ranges import ByteRange\n"
        "from rasteret_ml.raster.worker_loop import current_loop\n"
        "from rasteret_ml.testing import RangeServer\n"
        "pathlib.Path(sys.argv[1], 'f').write_bytes(b'x' * 100)\n"
        "with RangeServer(sys.argv[1]) as server:\n"
        "    read = lambda loop: loop.reader(FetchLimits()).read(server.url + '/f', ByteRange(0, 10))\n"
        "    assert current_loop().run(read).data == b'x' * 10\n"
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
