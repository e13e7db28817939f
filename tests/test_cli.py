"""The command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rasteret_ml.cli import main
from rasteret_ml.testing import make_cog


def test_build_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files to a Collection, and what it holds."""
    make_cog(tmp_path / "S_20230801_B02.tif", np.ones((50, 50), np.uint16))
    out = str(tmp_path / "c.parquet")
    assert main(["build", str(tmp_path / "*.tif"), "-o", out, "--bands", "B02"]) == 0
    assert "1 records from 1 files" in capsys.readouterr().out
    assert main(["info", out]) == 0
    said = capsys.readouterr().out
    assert "EPSG:32633" in said
    assert "B02" in said
    assert "2023-08-01" in said


def test_files_left_out_are_listed_and_the_status_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bad file does not stop the others."""
    make_cog(tmp_path / "good.tif", np.ones((50, 50), np.uint16))
    (tmp_path / "bad.tif").write_bytes(b"<html>nothing here</html>")
    assert main(["build", str(tmp_path), "-o", str(tmp_path / "c.parquet")]) == 1
    said = capsys.readouterr().out
    assert "bad.tif" in said
    assert "HTML" in said


def test_an_error_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its class and remedy, without a traceback."""
    assert main(["info", str(tmp_path / "none.parquet")]) == 1
    assert "CollectionError" in capsys.readouterr().err
