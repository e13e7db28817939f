"""Each script in `examples/` runs as it stands, says what must hold, and draws something."""

from __future__ import annotations

import re
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.features
import shapely
from forked import run_script
from matplotlib.image import imread

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TESTED_ELSEWHERE = {"cli", "eval", "plain_loop", "predict", "train"}  # test_readme.py, test_configs.py
PARTS = {"demo_scenes", "demo_sets", "experiment", "figures"}  # what the scripts share


def run(name: str, out: Path, *options: object) -> str:
    """What a script prints; its picture is there and not blank."""
    done = run_script(EXAMPLES / f"{name}.py", "--out", out, *options, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ResourceWarning" not in done.stderr
    (line,) = re.findall(r"^picture +(.*)$", done.stdout, re.MULTILINE)
    assert Path(line) == out / f"{name}.png"
    picture = imread(line)
    assert min(picture.shape[:2]) > 300
    # Text on white, or empty axes, have few colours.
    assert len(np.unique(picture[::3, ::3, :3].reshape(-1, 3), axis=0)) > 200
    return done.stdout


def number(pattern: str, text: str) -> float:
    """The one number that a pattern finds."""
    (found,) = re.findall(pattern, text, re.MULTILINE)
    return float(found)


def test_every_script_is_tested() -> None:
    """A new one needs a test here."""
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - PARTS - TESTED_ELSEWHERE
    tested = {name.removeprefix("test_").removesuffix("_example") for name in globals() if name.endswith("_example")}
    assert scripts == tested


def test_fields_example(tmp_path: Path) -> None:
    """Polygons with classes train a classifier from `label`, far beyond the majority."""
    text = run("fields", tmp_path / "out", "--epochs", 3)
    majority = number(r"majority class: ([\d.]+)", text)
    assert 0.25 < majority < 0.6
    assert number(r"validation accuracy +([\d.]+)", text) > majority + 0.3


def test_time_series_example(tmp_path: Path) -> None:
    """Fixed T with padding at the end; composites are clearer than the newest date."""
    text = run("time_series", tmp_path / "out")
    assert "(7, 4, 160, 160)" in text
    days = re.findall(r"^  (\S+) +(\d+)% valid, +(\d+)% clear$", text, re.MULTILINE)
    assert [day for day, _, _ in days] == [
        "2023-04-22", "2023-05-17", "2023-06-16", "2023-07-11", "2023-08-15", "2023-09-09", "padding",
    ]  # fmt: skip
    assert days[-1][1:] == ("0", "0")
    assert all(int(clear) <= int(valid) for _, valid, clear in days)
    newest = number(r"newest pixel +(\d+)% clear", text)
    assert newest == float(days[-2][2]) < 60
    assert number(r"clear pixels first +(\d+)% clear", text) > 95
    assert number(r"median of clear pixels +(\d+)% clear", text) > 95


def test_time_series_of_real_items(tmp_path: Path, shared_data: Path) -> None:
    """The same script on STAC items that others made."""
    text = run("time_series", tmp_path / "out", "--data", shared_data / "multidate" / "*" / "*.json")
    assert "2023-08-13" in text
    assert number(r"median of clear pixels +(\d+)% clear", text) > number(r"newest pixel +(\d+)% clear", text)


def test_time_series_model_example(tmp_path: Path) -> None:
    """A season tells more than its newest date, which is partly cloudy and autumnal."""
    text = run("time_series_model", tmp_path / "out")
    season, newest = (number(rf"^{name} +([\d.]+) of", text) for name in ("season", "newest date"))
    assert season > 0.85
    assert season > newest + 0.08


def test_zones_example(tmp_path: Path) -> None:
    """Both zones in one batch, and labels where the pixels say so on every grid."""
    text = run("zones", tmp_path / "out")
    (codes,) = re.findall(r"epsg \[([\d, ]+)\]", text)
    assert set(codes.split(", ")) == {"32632", "32633"}
    fits = re.findall(r"labels fit pixels +([\d.]+)", text)
    assert len(fits) == 3
    assert min(float(share) for share in fits) > 0.98


def test_labels_example(tmp_path: Path) -> None:
    """Two heads that agree, and classes left out by the remap alone."""
    text = run("labels", tmp_path / "out")
    assert number(r"heads agree +([\d.]+)", text) > 0.999
    ignored = re.findall(r"without a class +([\d.]+)% of the raster's, ([\d.]+)% of the polygons'", text)
    assert float(ignored[0][0]) > 5 > 2 > float(ignored[0][1])


def test_splits_example(tmp_path: Path) -> None:
    """The leaking split is refused, the blocks pass; the column is stored; statistics are written."""
    text = run("splits", tmp_path / "out")
    assert "random chips         refused: Splits 'train' and 'val' leak" in text
    assert "blocks               pass, 200 apart" in text
    assert "2 train, 1 val, 1 test" in text
    blocks = gpd.read_file(tmp_path / "out" / "blocks.geojson")
    parts = [rows.union_all() for _, rows in blocks.groupby("split")]
    assert min(a.distance(b) for i, a in enumerate(parts) for b in parts[:i]) >= 199.9
    statistics = (tmp_path / "out" / "statistics.yaml").read_text(encoding="utf-8")
    assert {"B02", "B03", "B04", "B08"} <= set(re.findall(r"B\d\d", statistics))


def test_sampling_example(tmp_path: Path) -> None:
    """Balanced chips see more of the rarest class, `min_valid` holds, the grid has every chip."""
    text = run("sampling", tmp_path / "out")
    rows = {name.strip(): rest for name, rest in re.findall(r"^(.{12}) +(\d.*%)$", text, re.MULTILINE)}
    shares = {name: [float(v) for v in re.findall(r"([\d.]+)%", rest)] for name, rest in rows.items()}
    assert min(shares["balanced"][1:]) > min(shares["uniform"][1:])
    assert max(shares["weighted"][1:]) > max(shares["uniform"][1:])
    assert shares["90 % valid"][0] > shares["uniform"][0]
    assert number(r"least valid chip +(\d+)%", text) >= 75
    assert rows["grid"].split()[0] == "121"


def test_combine_example(tmp_path: Path) -> None:
    """Both operand orders; channels of both; `|` fills what is not valid."""
    text = run("combine", tmp_path / "out", "--size", 64)
    lines = dict(re.findall(r"^(\S.*?) {2,}(\{.*\})$", text, re.MULTILINE))
    assert len(lines) == 7
    for name in ("ours & RasterDataset", "RasterDataset & ours"):
        assert "'image': (4, 4, 64, 64)" in lines[name]
    for name in ("ours & VectorDataset", "VectorDataset & ours", "RasterDataset & our polygons"):
        assert "'mask': (4, 64, 64)" in lines[name]
    assert "50% alone, 100% with `|`" in text


def test_real_polygons_train_a_classifier(tmp_path: Path, shared_data: Path) -> None:
    """Patches of the real land-cover raster as polygons, on real Sentinel-2 images of another grid of files."""
    folder = shared_data / "landcover"
    with rasterio.open(folder / "labels" / "sen2_20210527_aber_cls.tif") as file:
        data, transform, crs = file.read(1), file.transform, file.crs
    found = [
        (shapely.geometry.shape(s), int(v)) for s, v in rasterio.features.shapes(data, data != 0, transform=transform)
    ]
    large = [(polygon, value) for polygon, value in found if polygon.area >= 60 * 100]
    table = gpd.GeoDataFrame({"cover": [value for _, value in large]}, geometry=[p for p, _ in large], crs=crs)
    assert set(table["cover"]) == {1, 2, 3, 4}
    table.to_file(tmp_path / "patches.gpkg")
    text = run(
        "fields", tmp_path / "out", "--data", folder / "images" / "*.tif", "--aois", tmp_path / "patches.gpkg",
        "--label", "cover", "--epochs", 4,
    )  # fmt: skip
    majority = number(r"majority class: ([\d.]+)", text)
    assert majority < 0.5
    assert number(r"validation accuracy +([\d.]+)", text) > majority + 0.3
