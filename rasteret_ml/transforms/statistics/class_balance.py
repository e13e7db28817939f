"""Cells of a label raster with their class shares, and weights that even the classes out."""

from __future__ import annotations

from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import LONLAT, transform_geometries
from rasteret_ml.transforms.statistics.chip_pass import ChipPass

__all__ = ["balanced_weights", "label_cells"]

_PREFIX = "class_"
_STEPS = 500
_SETTLED = 1e-6


def label_cells(
    labels: Any, size: int, aois: Any = None, *, batch_size: int = 8, ignore_index: int = -100, key: str = "mask"
) -> gpd.GeoDataFrame:
    """A grid of cells over categorical labels with the share of each class in each, in one pass over all of them.

    Args:
        labels: A label dataset, or a combination whose samples have an integer `mask`.
        size: Side of a cell in the dataset's pixels; about a chip's.
        aois: Polygons to cover, whose outside does not count; None = everywhere.
        batch_size: Cells read together.
        ignore_index: Value of the labels that is no class.
        key: Key of the labels: of several heads one.

    Returns:
        A row for each cell with any label: its square (in lon/lat where the dataset has several CRSs), `valid` (share
        of its pixels that have a label) and `class_<value>` for each class, in order (share of these pixels; they sum
        to 1). To be sampled from as AOIs, with `balanced_weights` as their weights.

    Raises:
        UsageError: no or continuous labels.
    """
    chips = ChipPass(labels, aois, size, None, batch_size, 0, key)
    counts: list[dict[int, int]] = []
    totals, squares, texts = [], [], []
    for chip in chips:
        mask = chip.labels
        if mask is None or mask.dtype.kind == "f":
            kind = f"no {key!r}" if mask is None else f"a continuous {key!r}"
            raise UsageError(f"label_cells needs classes; these samples have {kind}.")
        found = mask[chip.labels_count & (mask != ignore_index)]
        if not len(found):
            continue
        counts.append(dict(zip(*(part.tolist() for part in np.unique(found, return_counts=True)), strict=True)))
        totals.append(mask.size)
        aoi = chips.grid.at(chip.position)
        squares.append((aoi[0].start, aoi[1].start, aoi[0].stop, aoi[1].stop))
        texts.append(str(aoi.crs))
    if not counts:
        raise UsageError("No labelled pixel was found; look at the labels' nodata and remap, or take other AOIs.")
    values = sorted({value for cell in counts for value in cell})
    table = np.array([[cell.get(value, 0) for value in values] for cell in counts], np.float64)
    labelled = table.sum(axis=1)
    columns = {f"{_PREFIX}{value}": share for value, share in zip(values, (table / labelled[:, None]).T, strict=True)}
    shapes, crs = _in_one_crs(shapely.box(*np.array(squares).T), np.array(texts))
    return gpd.GeoDataFrame({"valid": labelled / totals} | columns, geometry=shapes, crs=crs)


def _in_one_crs(shapes: npt.NDArray[np.object_], texts: npt.NDArray[Any]) -> tuple[npt.NDArray[np.object_], str]:
    """Shapes of one CRS as they are, of several in longitude/latitude."""
    found = np.unique(texts).tolist()
    if len(found) == 1:
        return shapes, str(found[0])
    for text in found:
        shapes[texts == text] = transform_geometries(shapes[texts == text], text, LONLAT)
    return shapes, LONLAT


def balanced_weights(cells: gpd.GeoDataFrame) -> npt.NDArray[np.float64]:
    """How often to draw each cell so that classes come as evenly as mixing over classes can make them.

    Each class draws cells in proportion to its pixels in them, so that every cell with any of a class keeps a weight;
    classes then get shares in the draw that maximise the mean logarithm of the classes' expected shares of pixels,
    found by the EM algorithm for mixture proportions (Dempster, Laird & Rubin 1977). Where even classes can be had
    they are.

    Args:
        cells: What `label_cells` gave: `valid`, and `class_<value>` columns.

    Returns:
        Weights `[N]`, not negative, summing to 1.

    Raises:
        UsageError: a table without class columns.
    """
    names = [name for name in cells.columns if str(name).startswith(_PREFIX)]
    if not names or not len(cells):
        raise UsageError(f"These are no label cells: no {_PREFIX}<value> columns in {list(cells.columns)}.")
    pixels = cells[names].to_numpy(np.float64) * cells["valid"].to_numpy(np.float64)[:, None]
    pixels = pixels[:, pixels.sum(axis=0) > 0]
    draws = pixels / pixels.sum(axis=0)
    # What a draw for one class brings of every class, as shares of a chip `[K, K]`.
    brings = draws.T @ pixels
    mix = np.full(len(brings), 1 / len(brings))
    for _ in range(_STEPS):
        expected = mix @ brings
        better = mix * (brings @ (1 / expected)) / len(mix)
        better /= better.sum()
        if np.abs(better - mix).max() < _SETTLED:
            break
        mix = better
    weights: npt.NDArray[np.float64] = draws @ mix
    weights /= weights.sum()
    return weights
