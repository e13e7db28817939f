"""The notebooks run from top to bottom, in one process; they are committed without outputs."""

from __future__ import annotations

import ast
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import rasterio
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.image import imread

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))


def load(name: str) -> dict[str, Any]:
    """A notebook."""
    notebook: dict[str, Any] = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def run_cells(name: str, folder: Path) -> dict[str, Any]:
    """Run the code cells in order and show what they end with, as a notebook does; return their variables."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(load(name)["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]), f"{name}[{number}]")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}[{number}]", "exec"), space)
        if last is not None:
            show(
                eval(compile(ast.Expression(last.value), f"{name}[{number}]", "eval"), space), folder / f"{number}.png"
            )
    return space


def show(value: object, path: Path) -> None:
    """Display a value: figures have colours, and datasets have a table."""
    if isinstance(value, Figure):
        value.savefig(path)
        assert len(np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)) >= 4
    elif hasattr(value, "_repr_html_"):
        assert value._repr_html_().startswith("<div>")
    else:
        repr(value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run a notebook in, with one thread, without windows; what it changes is put back."""
    threads, backend = torch.get_num_threads(), matplotlib.get_backend()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path
    plt.close("all")
    matplotlib.use(backend)
    torch.set_num_threads(threads)
    sys.modules.pop("demo_scenes", None)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_small_and_without_outputs(name):
    """Format 4.5, with distinct ids; no outputs, no counts."""
    notebook = load(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) <= 30
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_notebook_is_run():
    """A new one needs a test here."""
    assert NOTEBOOKS == ["from_torchgeo", "quickstart"]


def test_quickstart(folder, capsys):
    """Files to a map: the network learns, and the map is georeferenced."""
    found = run_cells("quickstart", folder)
    assert found["losses"][-1] < 0.7 * found["losses"][0]
    assert found["accuracy"] > 0.6
    assert "valid       95.3%" in capsys.readouterr().out
    with rasterio.open(folder / "outputs" / "quickstart" / "map.tif") as file:
        assert file.crs.to_epsg() == 32633
        assert file.shape == (1024, 1024)
        assert set(np.unique(file.read(1))) <= {0, 1, 2, 3, 255}


def test_from_torchgeo(folder):
    """Both give the same pixels; ours as stored, with validity; `&` of the two."""
    found = run_cells("from_torchgeo", folder)
    assert found["same"]
    assert found["before"]["image"].dtype == torch.float32
    assert "mask_valid" not in found["before"]
    assert found["after"]["image"].dtype == torch.uint16
    assert found["after"]["image"].shape == found["before"]["image"].shape == (8, 4, 128, 128)
    assert not found["ready"]["mask_valid"].all()
    assert found["batch"]["mask"].shape == (8, 128, 128)
