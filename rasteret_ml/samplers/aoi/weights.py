"""Which AOI a chip is drawn from: by area, by weight, by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd

from rasteret_ml.errors import UsageError
from rasteret_ml.samplers.aoi.aoi_columns import checked_weights, named_rows
from rasteret_ml.samplers.aoi.aoi_table import AOITable
from rasteret_ml.samplers.aoi.coverage import AOICoverage, ground_area

__all__ = ["Balance", "Weight", "place_weights"]

Floats = npt.NDArray[np.float64]

Weight = str | Sequence[float] | npt.NDArray[Any] | Callable[[gpd.GeoDataFrame], Any]
"""How often an AOI is drawn: a column, numbers `[N]`, or what a callable makes of the table's rows."""
Balance = bool | str | Sequence[Any] | npt.NDArray[Any]
"""The table's labels (True), a column, or values `[N]`: classes that are to be drawn equally often."""


def place_weights(
    places: AOICoverage, regions: npt.NDArray[np.object_], weight: Weight | None, balance: Balance | None
) -> Floats | None:
    """How often each place is drawn, in proportion `[P]`; None = by the area of its region in the CRS's units.

    Args:
        places: The places.
        regions: Where a chip's centre may lie in each `[P]`.
        weight: Of AOIs; None = the table's own weights, or the area on the ground.
        balance: Of AOIs; None or False = not balanced.

    Raises:
        UsageError: a weight that is none, a balance of values that are not classes, or no AOIs to weigh.
    """
    table, balanced = places.table, balance is not None and balance is not False
    if table is None:
        if weight is not None or balanced:
            raise UsageError("weight= and balance= choose between AOIs; give aois=.")
        return None if len(places.frames) == 1 else _areas(places, regions)
    given = _weights(table, weight)
    if given is None and not balanced and len(places.frames) == 1:
        return None
    areas = _areas(places, regions)
    chosen = areas if given is None else _times_areas(given, areas, places.aoi)
    if balanced:
        classes = _classes(table, balance)[places.aoi]
        totals: Floats = np.bincount(classes, chosen).astype(np.float64)
        _refuse_empty(table, classes, totals, places)
        chosen = chosen / np.where(totals > 0, totals, 1)[classes]
    if not chosen.any():
        raise UsageError("All AOIs that chips can come from have the weight 0: nothing could be drawn.")
    return np.asarray(chosen, dtype=np.float64)


def _areas(places: AOICoverage, regions: npt.NDArray[np.object_]) -> Floats:
    """Of a region that is a mere point or line, as good as none."""
    areas = ground_area(places, regions)
    return np.where(areas > 0, areas, np.finfo(np.float64).tiny)


def _weights(table: AOITable, weight: Weight | None) -> Floats | None:
    if weight is None:
        return table.weights
    return checked_weights(table.column(weight, "weight"), table.rows)


def _times_areas(given: Floats, areas: Floats, owner: npt.NDArray[np.int64]) -> Floats:
    """Weights of AOIs, of each place its part by area; none of them so large that they could not be multiplied."""
    share = areas / np.bincount(owner, areas, minlength=len(given))[owner]
    return np.asarray((given / np.max(given))[owner] * share)


def _classes(table: AOITable, balance: Any) -> npt.NDArray[np.int64]:
    """A number from 0 for the class of each AOI `[N]`."""
    if balance is True:
        if table.labels is None:
            raise UsageError("balance=True balances labels: give the table some, AOITable.of(…, label=), or a column.")
        column = pd.Series(table.labels)
    else:
        column = table.column(balance, "balance")
    if column.isna().any():
        raise UsageError(f"AOIs {named_rows(table.rows[column.isna().to_numpy()])} have no class to balance by.")
    if pd.api.types.is_float_dtype(column.dtype):
        raise UsageError(
            "Labels that are values cannot be balanced; bin them into classes, for example with pandas.cut."
        )
    numbers: npt.NDArray[np.int64] = pd.factorize(column)[0].astype(np.int64)
    return numbers


def _refuse_empty(table: AOITable, classes: npt.NDArray[np.int64], totals: Floats, places: AOICoverage) -> None:
    empty = np.isin(classes, np.flatnonzero(totals <= 0))
    if empty.any():
        rows = named_rows(np.unique(table.rows[places.aoi[empty]]))
        raise UsageError(f"All AOIs of a class have the weight 0, so that it cannot be balanced: {rows}.")
