"""Run each measurement in a fresh process, so that readers share no cache, thread or memory."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("throughput.py")
_MARK = "RESULT "


class TrialError(RuntimeError):
    """A trial ended without a result; the message holds its standard error."""


def run(task: str, arguments: Mapping[str, Any], *, env: Mapping[str, str] | None = None, timeout: float = 3600) -> Any:
    """Call `module:function` of this folder in a new process; arguments and result travel as JSON.

    Raises:
        TrialError: the process failed.
    """
    command = [sys.executable, str(_PROGRAM), "trial"]
    with tempfile.TemporaryFile("w+") as errors:
        text = json.dumps({"task": task, "arguments": dict(arguments)})
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | dict(env or {}),
            start_new_session=True,  # a process group of its own, so that workers end with it
        )
        try:
            out, _ = process.communicate(text, timeout=timeout)
        finally:
            _kill_group(process)
        results = [line for line in out.splitlines() if line.startswith(_MARK)]
        if process.returncode != 0 or not results:
            errors.seek(0)
            raise TrialError(f"{task} {arguments}: exit status {process.returncode}\n{errors.read()[-4000:]}")
    return json.loads(results[-1].removeprefix(_MARK))


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill the remaining processes of the trial."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Run a task from standard input in this process, print its result and exit at once."""
    request = json.load(sys.stdin)
    module, _, name = request["task"].partition(":")
    result = getattr(importlib.import_module(module), name)(**request["arguments"])
    print(f"{_MARK}{json.dumps(result)}", flush=True)
    os._exit(0)  # loaders are still in the middle of an epoch: do not wait for their workers


def rate(times: Sequence[float], warm: int, batches: int, batch_size: int) -> float:
    """Return chips per second between the arrivals of batches `warm` and `warm + batches` (counted from 1)."""
    arrived = sorted(times)
    return batches * batch_size / (arrived[warm + batches - 1] - arrived[warm - 1])


def memory_now(pid: int | str = "self") -> dict[str, float]:
    """Return resident, private and peak memory of a process in MB (Linux)."""
    fields = {"VmRSS": "resident", "RssAnon": "private", "VmHWM": "peak"}
    memory = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in fields:
            memory[fields[key]] = int(value.split()[0]) / 1024
    return memory


def reset_peak() -> None:
    """Reset the peak memory of this process to its present memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
