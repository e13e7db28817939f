"""Run a script in a process of its own that does not pay for importing torch, torchgeo and Lightning again."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch


def run_script(
    script: Path, *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python script *arguments` in `cwd`, forked from the server that `conftest.py` makes import these libraries.

    A process that a signal ended has the signal's number, negated, as its `returncode`, as with `subprocess.run`.
    """
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_run, args=(command, cwd, dict(env or {}), outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, *(path.read_bytes() for path in outputs))
        code, texts = process.exitcode, [path.read_text(encoding="utf-8") for path in outputs]
        process.close()
    return subprocess.CompletedProcess(command, code, *texts)


def _run(command: list[str], cwd: Path, env: dict[str, str], outputs: list[Path]) -> None:
    os.setsid()
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    multiprocessing.set_start_method(None, force=True)  # the platform's own again
    torch.set_num_threads(1)  # the models are tiny
    warnings.simplefilter("default")
    runpy.run_path(command[0], run_name="__main__")
    gc.collect()  # ResourceWarnings are printed now
