"""Cells of a label raster with the share of each class, and sampling weights that balance the classes."""

from __future__ import annotations

from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import LONLAT, transform_geometries
from rasteret_ml.transforms.chip_pass import ChipPass

_PREFIX = "class_"
_MAX_STEPS = 500
_TOLERANCE = 1e-6


def label_cells(
    labels: Any, size: int, aois: Any = None, *, batch_size: int = 8, ignore_index: int = -100, key: str = "mask"
) -> gpd.GeoDataFrame:
    """Cut categorical labels into a grid of cells with the share of each class in each, in one pass.

        cells = rm.label_cells(labels, 256)
        sampler = rm.RandomAOISampler(dataset, 256, 1000, cells, weight=rm.balanced_weights(cells), placement="centre")

    Args:
        labels: A label dataset, or a combination whose samples have an integer `mask`.
        size: Side of a cell in the dataset's pixels; about that of a chip.
        aois: Polygons to cover, pixels outside do not count; None = everywhere.
        batch_size: Cells to read together.
        ignore_index: Label value that is not a class.
        key: Key of the labels, where there are several heads.

    Returns:
        A row for each cell with labels: its square (in lon/lat where the dataset has several CRSs), `valid` (share of
        its pixels with a label), and `class_<value>` for each class in order (share of the labelled pixels; they sum to
        1). Sample from them as AOIs, with `balanced_weights`.

    Raises:
        UsageError: no labels, or continuous ones.
    """
    chips = ChipPass(labels, aois, size, None, batch_size, 0, key)
    counts: list[dict[int, int]] = []
    totals, squares, crs_texts = [], [], []
    for chip in chips:
        mask = chip.labels
        if mask is None or mask.dtype.kind == "f":
            found = f"no {key!r}" if mask is None else f"a continuous {key!r}"
            raise UsageError(f"label_cells needs classes; these samples have {found}.")
        counted = chip.class_counts(ignore_index)
        if not counted:
            continue
        counts.append(counted)
        totals.append(mask.size)
        aoi = chips.grid.at(chip.position)
        squares.append((aoi[0].start, aoi[1].start, aoi[0].stop, aoi[1].stop))
        crs_texts.append(str(aoi.crs))
    if not counts:
        raise UsageError("No labelled pixel was found; check the labels' nodata and remap, or choose other AOIs.")
    values = sorted({value for cell in counts for value in cell})
    table = np.array([[cell.get(value, 0) for value in values] for cell in counts], np.float64)
    sums = table.sum(axis=1)
    columns = {f"{_PREFIX}{value}": share for value, share in zip(values, (table / sums[:, None]).T, strict=True)}
    shapes, crs = _in_one_crs(shapely.box(*np.array(squares).T), np.array(crs_texts))
    return gpd.GeoDataFrame({"valid": sums / totals} | columns, geometry=shapes, crs=crs)


def _in_one_crs(shapes: npt.NDArray[np.object_], texts: npt.NDArray[Any]) -> tuple[npt.NDArray[np.object_], str]:
    """Transform shapes to longitude/latitude if they are in several CRSs."""
    found = np.unique(texts).tolist()
    if len(found) == 1:
        return shapes, str(found[0])
    for text in found:
        shapes[texts == text] = transform_geometries(shapes[texts == text], text, LONLAT)
    return shapes, LONLAT


def balanced_weights(cells: gpd.GeoDataFrame) -> npt.NDArray[np.float64]:
    """Compute how often to draw each cell so that classes come as evenly as possible.

    Each class draws cells in proportion to its pixels in them, so every cell with labels keeps a weight. The mix of
    these draws maximises the mean logarithm of the classes' expected shares of pixels, found by the EM algorithm for
    mixture proportions (Dempster, Laird & Rubin 1977). Shares are equal where that is possible.

    Args:
        cells: What `label_cells` returned: `valid`, and `class_<value>` columns.

    Returns:
        Weights `[N]`, not negative, summing to 1.

    Raises:
        UsageError: a table without class columns.
    """
    names = [name for name in cells.columns if str(name).startswith(_PREFIX)]
    if not names or not len(cells):
        raise UsageError(
            f"cells must have {_PREFIX}<value> columns, as label_cells returns them; got {list(cells.columns)}."
        )
    pixels = cells[names].to_numpy(np.float64) * cells["valid"].to_numpy(np.float64)[:, None]
    pixels = pixels[:, pixels.sum(axis=0) > 0]
    draws = pixels / pixels.sum(axis=0)
    # Expected pixels of each class in a draw for one class, as shares of a chip `[K, K]`.
    yields = draws.T @ pixels
    mix = np.full(len(yields), 1 / len(yields))
    for _ in range(_MAX_STEPS):
        expected = mix @ yields
        updated = mix * (yields @ (1 / expected)) / len(mix)
        updated /= updated.sum()
        if np.abs(updated - mix).max() < _TOLERANCE:
            break
        mix = updated
    weights: npt.NDArray[np.float64] = draws @ mix
    weights /= weights.sum()
    return weights
