"""Indexes that TorchGeo's splitters assign, made whole again."""

from __future__ import annotations

from typing import Any

import geopandas as gpd

from rasteret_ml.errors import UsageError

__all__ = ["whole_index"]


def whole_index(new: Any, old: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """`new` with the CRS and the column names that it lost on its way from `old`.

    TorchGeo's `random_grid_cell_assignment` numbers the columns (the old geometry is then one of them), and that of 0.8
    forgets the CRS. Anything else is given back as it is.

    Raises:
        UsageError: not a GeoDataFrame with geometries.
    """
    if not isinstance(new, gpd.GeoDataFrame) or new._geometry_column_name not in new.columns:
        raise UsageError(f"A dataset's index is a GeoDataFrame with a geometry, not a {type(new).__name__}.")
    names, crs = list(old.columns), old.crs if new.crs is None else new.crs
    if list(new.columns) != [*range(len(names)), new.geometry.name]:
        return new.set_crs(crs) if new.crs is None else new
    data = {name: new[i].to_numpy() for i, name in enumerate(names) if name != old.geometry.name}
    typed = {name: values.astype(old[name].dtype) for name, values in data.items()}
    return gpd.GeoDataFrame(typed, geometry=new.geometry.to_numpy(), crs=crs, index=new.index)
