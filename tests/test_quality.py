"""Ruff and the type check, as tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "--no-cache", "."], ["ruff", "format", "--no-cache", "--check", "."], ["mypy"]],
    ids=" ".join,
)
def test_clean(command: list[str], tmp_path: Path) -> None:
    """The command finds nothing."""
    extra = ["--cache-dir", str(tmp_path)] if command[0] == "mypy" else []
    done = subprocess.run(
        [sys.executable, "-m", *command, *extra], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
