"""Every measurement runs in a fresh process, so that readers share no cache, no thread and no memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("throughput.py")
_MARK = "RESULT "


class TrialError(RuntimeError):
    """A trial ended without a result; the message holds what it wrote."""


def run(task: str, arguments: Mapping[str, Any], *, env: Mapping[str, str] | None = None, timeout: float = 3600) -> Any:
    """Call `module:function` of this folder with `arguments` (JSON) in a new process; its answer (JSON).

    Raises:
        TrialError: it failed.
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
            start_new_session=True,  # its workers end with it
        )
        try:
            out, _ = process.communicate(text, timeout=timeout)
        finally:
            _end(process)
        answer = [line for line in out.splitlines() if line.startswith(_MARK)]
        if process.returncode != 0 or not answer:
            errors.seek(0)
            raise TrialError(f"{task} {arguments}: exit status {process.returncode}\n{errors.read()[-4000:]}")
    return json.loads(answer[-1].removeprefix(_MARK))


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the trial's process group."""
    try:
        os.killpg(process.pid, 9)
    except (ProcessLookupError, PermissionError):
        return


def main() -> None:
    """The other side: read the task from standard input, do it, print the answer, leave at once."""
    request = json.load(sys.stdin)
    module, _, name = request["task"].partition(":")
    answer = getattr(importlib.import_module(module), name)(**request["arguments"])
    print(f"{_MARK}{json.dumps(answer)}", flush=True)
    os._exit(0)  # loaders are left in the middle of an epoch; nobody waits for their workers


def rate(times: Sequence[float], warm: int, batches: int, batch_size: int) -> float:
    """Chips a second between the arrival of batch `warm` and that of batch `warm + batches` (counted from 1)."""
    arrived = sorted(times)
    return batches * batch_size / (arrived[warm + batches - 1] - arrived[warm - 1])


def memory_now(pid: int | str = "self") -> dict[str, float]:
    """Resident, private and peak memory of a process in MB (Linux)."""
    fields = {"VmRSS": "resident", "RssAnon": "private", "VmHWM": "peak"}
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in fields:
            found[fields[key]] = int(value.split()[0]) / 1024
    return found


def forget_peak() -> None:
    """Let the peak of this process start again from now."""
    Path("/proc/self/clear_refs").write_text("5")
