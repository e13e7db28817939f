"""What the README shows runs unchanged, is short, and names what exists."""

from __future__ import annotations

import importlib
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import rasterio
import torch
from forked import run_script

import rasteret_ml as rm

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


MORE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def blocks(heading: str) -> list[tuple[str, str]]:
    """(language, text) of the code under a heading, in its order."""
    (section,) = re.findall(rf"^## {heading}$(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def run_python(code: str, space: dict[str, object] | None = None) -> dict[str, object]:
    """Run a snippet in this process; return its variables."""
    space = {"__name__": "readme"} if space is None else space
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), space)
    return space


def test_the_readme_is_short() -> None:
    """At most 1,200 words outside code."""
    assert len(CODE.sub("", README).split()) <= 1200


def test_links_lead_somewhere() -> None:
    """Relative links lead to files, and their anchors to headings."""
    for text, folder in ((README, ROOT), (MORE, ROOT / "examples")):
        links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([\w-]+))?\)", text)
        assert len(links) > 10
        for target, anchor in links:
            assert (folder / target).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (folder / target).read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_names_exist() -> None:
    """Every `rm.name` of the two pages is a public name, and every example is listed."""
    names = set(re.findall(r"\brm\.([A-Za-z_]\w*)", README + MORE))
    assert names <= set(rm.__all__)
    scripts = {path.name for path in (ROOT / "examples").glob("*.*") if path.suffix in (".py", ".ipynb")}
    shared = {"demo_scenes.py", "demo_sets.py", "experiment.py", "figures.py"}
    assert scripts - shared <= set(re.findall(r"\]\((\w+\.\w+)\)", MORE))


def test_the_fifteen_lines_run(tmp_path: Path) -> None:
    """In an empty folder, by an interpreter of their own."""
    language, code = blocks("In fifteen lines")[0]
    assert language == "python"
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["torch.uint16 (16, 4, 256, 256) 1.0"] * 4


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of the repository to run commands in; what they change of this process is put back. One thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    root = logging.getLogger()
    before, level, backend = list(root.handlers), root.level, matplotlib.get_backend()
    yield tmp_path
    torch.set_num_threads(threads)
    matplotlib.use(backend)
    root.setLevel(level)
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a shell block, in this process: it saves the time that imports take."""
    program, script, *arguments = shlex.split(line)
    assert program == "python"
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.syspath_prepend(str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
    for name in [n for n, m in sys.modules.items() if "/examples/" in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def test_the_doors_run_as_printed(clone, monkeypatch, capsys):
    """A plain loop, Lightning, Hydra with a sweep and a map, LightningCLI: each command, in their order."""
    ((_, demo),) = [block for block in blocks("In fifteen lines") if block[0] == "sh"]
    run_command(demo, monkeypatch)
    commands = 0
    for language, text in blocks("Training"):
        if language == "python":
            run_python(text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            run_command(line, monkeypatch)
            commands += 1
    assert commands >= 7
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(?:validation|test) mIoU +0\.\d+", printed, re.MULTILINE)) >= 3
    assert (clone / "batch.png").stat().st_size > 10_000
    assert len(list((clone / "logs" / "debug" / "multiruns").glob("*/[01]/.hydra/config.yaml"))) == 2
    assert set(clone.glob("**/*.tif")) - set(clone.glob("scenes/*")) == {
        clone / name for name in ("map.tif", "plain.tif", "logs/first/prediction.tif", "logs/cli/scenes/map.tif")
    }
    with rasterio.open(clone / "map.tif") as found:
        assert found.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
        assert found.crs.to_epsg() == 32633
        assert found.shape == (1024, 1024)
        assert set(np.unique(found.read(1))) <= {0, 1, 2, 3, 255}
        assert found.colormap(1)[0] == (38, 110, 180, 255)
    with rasterio.open(clone / "logs" / "first" / "prediction.tif") as trained, rasterio.open("map.tif") as found:
        np.testing.assert_array_equal(trained.read(1), found.read(1))


def test_pixels_of_polygons(clone, capsys):
    """`load_bands` as printed: the one scene that the polygon is in."""
    importlib.import_module("demo_scenes").make_scenes(clone / "scenes")
    ((language, code),) = blocks("Pixels of polygons")
    assert language == "python"
    run_python(code)
    record, ndvi = capsys.readouterr().out.split()
    assert record == "T33_00_20230815"
    assert 0 < float(ndvi) < 1


def test_the_recipes_run(clone):
    """Each in its turn, on the Collections and datasets that their introduction names."""
    demo = importlib.import_module("demo_sets")
    demo.make_fields(clone)
    zones, _ = demo.make_zones(clone / "zones")
    season = demo.make_season(clone / "season")
    scenes = rm.build("T33_*.tif", "scenes.parquet", bands=demo.BANDS)
    labels = rm.build("land_cover.tif", "labels.parquet", datetime=None)
    found = {
        "rm": rm,
        "scenes": scenes,
        "season": rm.build([str(path) for path in season], "season.parquet", bands=[*demo.BANDS, "SCL"]),
        "zones": rm.build(zones, "zones.parquet", bands=demo.BANDS),
        "images": rm.RasteretDataset(scenes, scenes.bands),
        "cover": rm.RasteretDataset(labels, labels.bands, is_image=False),
    }
    recipes = blocks("Recipes")
    assert len(recipes) == 5
    for language, code in recipes:
        assert language == "python"
        run_python(code, found)
    size = slice(500_000, 500_640), slice(5_099_000, 5_099_640)
    assert found["series"][size]["image"].shape == (4, 2, 64, 64)
    assert found["median"][size]["image"].shape == (2, 64, 64)
    assert set(found["segmentation"][size]) >= {"image", "mask", "mask_valid"}
    sampler = rm.RandomAOISampler(found["native"], 32, 16, seed=1)
    batch = next(iter(rm.DataLoader(found["native"], batch_size=16, sampler=sampler)))
    assert set(batch["epsg"].tolist()) == {32632, 32633}
    assert len(next(iter(rm.DataLoader(found["images"], batch_size=8, sampler=found["classification"])))["label"]) == 8
    found["data"].setup("fit")
    assert len(next(iter(found["data"].train_dataloader()))["image"]) == 16
    assert (clone / "statistics.yaml").exists()
    found["loader"].close()


def test_the_demo_trains_and_writes_a_map(tmp_path: Path) -> None:
    """Small and short: it still says what it measured, and the map is georeferenced where the scenes are."""
    command = [f"hydra.run.dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    command += ["data.sampling.size=64", "data.sampling.length=16", "data.loading.batch_size=8"]
    command += ["trainer.max_epochs=1", "data.normalization.max_chips=4", "trainer.enable_progress_bar=false"]
    command += ["data.sampling.overlap=0"]
    done = run_script(ROOT / "examples" / "train.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"validation mIoU +0\.\d+ .*majority class: 0\.\d+", done.stdout)
    assert re.search(r"patches per second +\d", done.stdout)
    assert re.search(r"wait share +\d", done.stdout)
    with rasterio.open(tmp_path / "run" / "prediction.tif") as found:
        assert found.crs.to_epsg() == 32633
        assert found.transform[:6] == (10.0, 0.0, 499980.0, 0.0, -10.0, 5100000.0)
        assert found.shape == (1024, 1024)
        classes = found.read(1)
        assert set(np.unique(classes)) <= {0, 1, 2, 3, 255}
        assert (classes[:512, :12] == 255).all()  # no data there
        assert found.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
        assert found.colormap(1)[0] == (38, 110, 180, 255)
    assert (tmp_path / "run" / "prediction.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert list((tmp_path / "run" / "csv").rglob("metrics.csv"))
