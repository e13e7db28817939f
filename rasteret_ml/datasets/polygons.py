"""Polygons as labels: classes or values, rasterized onto the requested chip."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
import torch
from affine import Affine
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import GeoDataset

from rasteret_ml.collection.collection import shorten, summary_html
from rasteret_ml.datasets.batches import BatchRequest, SampleBatch
from rasteret_ml.datasets.chip_dataset import ChipDataset, same_res
from rasteret_ml.datasets.combine import RasteretIntersection, RasteretUnion
from rasteret_ml.datasets.dataset_config import RasterizeConfig, describe_grid, label_key
from rasteret_ml.datasets.index.scene_index import describe_times, pack_index, reproject_index, unpack_index
from rasteret_ml.datasets.polygon_table import label_values, polygon_table
from rasteret_ml.datasets.rasterize import PolygonLookup, rasterize_positions, reproject_polygons
from rasteret_ml.errors import NoOverlapError, UsageError, redact
from rasteret_ml.geo.crs import crs_text, pyproj_crs, same_crs, transform_geometries
from rasteret_ml.geo.geometries import polygons_from
from rasteret_ml.geo.grid import Grid, pixel_size, round_half_up
from rasteret_ml.geo.regions import polygonal_each
from rasteret_ml.raster.read import ReadResult
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.sampler import config_from
from rasteret_ml.samples.buffers import batch_rows
from rasteret_ml.samples.sample import TENSOR_ONLY, Sample, aoi_columns, bounds_tensor, snapped_slices


class PolygonDataset(ChipDataset):
    """Label samples `mask [H, W]` and `mask_valid [1, H, W]`, rasterized from polygons onto the requested chip.

    Made for the right side of an `&` (`images & polygons`): the chip then lies on the images' grid, in any CRS.
    Polygons have no pixels of their own. On the left of an `&` or `|` without `res` they take CRS, resolution and
    pixel corners of the other side; alone they need `res`, and a chip lies exactly at the requested bounds.

    The index says where labels are known. Without `background` and `extent` it has one row per polygon: a chip that
    overlaps none raises NoOverlapError, and samplers draw only where polygons are. With one of them it is the extent,
    one row for each distinct time of the polygons: a chip without polygons is a regular sample, all background (or,
    without `background`, all unknown). TorchGeo's splitters cut this index, and what they remove is not rasterized.

    Args:
        polygons: Any table of polygons (see `geometries_from`). Invalid ones are repaired; points and lines are
            refused.
        label: Column of the classes (text or whole numbers) or values; None = every polygon is class 1.
        classes: Column value to class: a list (the position is the class) or a mapping. Default the sorted distinct
            values: 0, 1, 2 …, without the number of the `background`. Polygons of other values, or of none, cover
            those below them and are unknown: `ignore_index`, and False in `mask_valid`.
        continuous: Whether the column holds numbers: float32, NaN where unknown.
        background: Class (or value) of pixels outside all polygons; None = unknown.
        ignore_index: Class of unknown pixels.
        rasterize: How polygons become pixels: a `RasterizeConfig` (`order`, `all_touched`), or a mapping of its fields.
        extent: Where labels are known: a polygon or bounding box in the polygons' CRS, or a table. With `background`
            the default is the box around all polygons.
        time: Column of times or of ISO intervals ("2021-05-01/2021-08-31"), or two: (start, end), both ends included,
            in UTC. Text or dates that name a day, month or year mean all of it; missing ends are open. None =
            the polygons hold at all times.
        crs: CRS of chips that have no other grid; default the polygons' own.
        res: Pixel size in its units, one number or (x, y).
        polygons_crs: CRS of polygons that do not carry one; default longitude/latitude.
        key: Key of the labels, beginning with "mask"; a different one for each of several heads.
        transforms: Called with each sample, as in TorchGeo.

    Raises:
        UsageError: an unknown or unsuitable column, classes that contradict each other, or an invalid key.
        GeometryError: a geometry that is missing, empty or no polygon (the message names its row).

    Example:
        >>> fields = rm.PolygonDataset("fields.gpkg", "crop", background=0)  # doctest: +SKIP
        >>> (images & fields)[500000:502560, 4997440:5000000]["mask"].shape  # doctest: +SKIP
        torch.Size([256, 256])
    """

    def __init__(
        self,
        polygons: Any,
        label: str | None = None,
        *,
        classes: Sequence[Any] | Mapping[Any, int] | None = None,
        continuous: bool = False,
        background: Any = None,
        ignore_index: int = -100,
        rasterize: RasterizeConfig | Mapping[str, Any] | None = None,
        extent: Any = None,
        time: str | tuple[str, str] | None = None,
        crs: Any = None,
        res: float | tuple[float, float] | None = None,
        polygons_crs: Any = None,
        key: str = "mask",
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        geometries = polygons_from(polygons, polygons_crs)
        self.ignore_index = int(ignore_index)
        self._labels = label_values(geometries, label, classes, continuous, background, self.ignore_index)
        self._rasterize = config_from(RasterizeConfig, rasterize, "rasterize")
        self._table = polygon_table(geometries, self._rasterize.order, time)
        has_extent = extent is not None or background is not None
        self._extent = _extent(extent, geometries.crs, self._table) if has_extent else None
        self.key, self.transforms = label_key(key, "mask"), transforms
        self.paths: list[str] = []
        self._own_crs, self._crs = geometries.crs, geometries.crs if crs is None else crs_text(crs)
        self._res = pixel_size(res) or (0.0, 0.0)
        self._corner: tuple[float, float] | None = None
        self._index = self._made = self._make_index()
        self._lookup: PolygonLookup | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {"_made": self._index is self._made, "_table": pack_index(self._table), "_lookup": None}
        return super().__getstate__() | state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_table": unpack_index(state["_table"])})
        self._made = self._index if state["_made"] else None

    def __repr__(self) -> str:
        classes = f"classes=[{redact(shorten(list(self.classes)))}]" if self.classes else "values"
        return f"PolygonDataset({len(self._table):,} polygons, {classes}, [{describe_grid(self)}])"

    def _repr_html_(self) -> str:
        """Summary for notebooks. Samples are plain dicts; the last row says what they hold."""
        classes = [f"{number} = {value}" for value, number in self.classes.items()]
        dtype = "int64" if classes else "float32"
        rows = {
            "Polygons": f"{len(self._table):,}",
            "Classes": shorten(classes) or "none: values",
            "Grid": describe_grid(self),
            "Time": describe_times(self.index),
            "Samples": ", ".join([f"{self.key} [H, W] {dtype}", *sorted(self.sample_keys - {self.key})]),
        }
        return summary_html("PolygonDataset", rows)

    # The grid ---------------------------------------------------------------------------------------------

    @property
    def classes(self) -> dict[Any, int]:
        """Value in the column to class; empty for continuous labels."""
        return dict(self._labels.classes)

    @property
    def grid(self) -> Grid | None:
        """The grid that chips lie on; None = they lie at the requested bounds."""
        if self._corner is None or 0 in self._res:
            return None
        transform = Affine(self._res[0], 0.0, self._corner[0], 0.0, -self._res[1], self._corner[1])
        return Grid(crs=self._crs, transform=transform, shape=(1, 1))

    @property
    def crs(self) -> Any:
        """CRS of chips, a pyproj object as in TorchGeo. Setting it reprojects the index."""
        return pyproj_crs(self._crs)

    @crs.setter
    def crs(self, new_crs: Any) -> None:
        text = crs_text(new_crs)
        if text == self._crs:
            return
        unchanged, self._crs, self._corner = self._index is self._made, text, None
        if unchanged:
            self._index = self._made = self._make_index()
        else:
            index = reproject_index(self._index, text)
            self._index = index.set_geometry(polygonal_each(np.asarray(index.geometry, dtype=object)), crs=text)

    @property
    def res(self) -> tuple[float, float]:
        """Pixel size (x, y) of chips in CRS units; zeros where none was chosen, as in TorchGeo."""
        return self._res

    @res.setter
    def res(self, new_res: float | tuple[float, float]) -> None:
        self._res = pixel_size(new_res) or self._res

    def _make_index(self) -> gpd.GeoDataFrame:
        if self._extent is None:
            shapes = reproject_polygons(np.asarray(self._table.geometry, dtype=object), self._own_crs, self._crs)
            times, columns = self._table.index, {"polygon": np.arange(len(self._table))}
        else:
            extent = np.array([self._extent], dtype=object)
            if not same_crs(self._own_crs, self._crs):
                extent = polygonal_each(transform_geometries(extent, self._own_crs, self._crs))
            times, columns = self._table.index.unique(), {}
            shapes = np.repeat(extent, len(times))
        unprojected = ~np.isfinite(shapely.bounds(shapes)).all(axis=1)
        if unprojected.any():
            name = "The extent" if self._extent is not None else f"Polygon {int(np.argmax(unprojected))}"
            raise UsageError(
                f"{name} cannot be projected to {self._crs}; choose another crs=, or cut it to your area first."
            )
        return gpd.GeoDataFrame(columns, geometry=shapes, crs=self._crs, index=times)

    def chip_grid(self, query: Any) -> Grid:
        """Return the grid of a query's chip.

        Raises:
            UsageError: not a spatial query, invalid bounds, or no pixel size.
        """
        x, y, _ = self._slices(query)
        if not x.step or not y.step:
            raise UsageError(
                "Polygons have no pixels: give res=, steps of the slices, or combine them with images by `&`."
            )
        res = pixel_size((x.step, y.step)) or self._res
        xmin, ymin, xmax, ymax = bounds = (float(x.start), float(y.start), float(x.stop), float(y.stop))
        crs = query.crs if isinstance(query, AOI) and query.crs is not None else self._crs
        grid = self.grid if crs == self._crs else None
        if grid is not None and same_res(res, self._res):
            return grid.snap(bounds)
        if not (xmax > xmin and ymax > ymin and np.isfinite(bounds).all()):
            raise UsageError(f"Bounds must be finite with xmin < xmax and ymin < ymax, got {bounds}.")
        width, height = round_half_up((xmax - xmin) / res[0]), round_half_up((ymax - ymin) / res[1])
        transform = Affine(res[0], 0.0, xmin, 0.0, -res[1], ymax)
        return Grid(crs=crs, transform=transform, shape=(max(1, height), max(1, width)))

    # Rasterizing --------------------------------------------------------------------------------------------

    @property
    def version(self) -> tuple[Any, ...]:
        """See `ReadableDataset`."""
        return self._index, self._crs, self._res, self._corner

    @property
    def ignored_classes(self) -> dict[str, int]:
        """See `ReadableDataset`."""
        return {self.key: self.ignore_index}

    @property
    def sample_keys(self) -> set[str]:
        """Keys of every sample, whatever the query."""
        return {self.key, "mask_valid", "transform"}

    def requests(self, queries: Sequence[Any], grids: Sequence[Grid] | None = None) -> BatchRequest:
        """Plan a batch (pure); polygons are in memory, so it reads nothing and cannot fail."""
        if grids is None:
            grids = [self.chip_grid(query) for query in queries]
        nbytes = sum(grid.height * grid.width for grid in grids) * 16
        return BatchRequest(queries=queries, grids=grids, nbytes=nbytes)

    def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch:
        """Rasterize the samples of a batch, on grids in any CRS."""
        queries, grids = batch.queries, batch.grids
        if not queries:
            return SampleBatch(samples=[])
        dtype = torch.float32 if self._labels.values.dtype.kind == "f" else torch.int64
        shapes = [grid.shape for grid in grids]
        masks, valids = batch_rows(shapes, dtype), batch_rows([(1, *shape) for shape in shapes], torch.bool)
        times = [self._disambiguate_slice(query)[2] for query in queries]
        for grid, t, mask, valid in zip(grids, times, masks, valids, strict=True):
            self._rasterize_labels(grid, t, mask.numpy(), valid.numpy()[0])
        columns: dict[str, Sequence[Any]] = {self.key: masks, "mask_valid": valids}
        columns |= _query_columns(queries, grids, times)
        samples = [{name: column[i] for name, column in columns.items()} for i in range(len(queries))]
        return SampleBatch(samples=self._transformed(samples))

    def _rasterize_labels(self, grid: Grid, t: slice, mask: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> None:
        """Write the labels of a chip `[H, W]`, and where they are known `[H, W]`."""
        lookup, labels = self._polygon_lookup(), self._labels
        positions, shapes = lookup.polygons.at(grid, t)
        known = shapes if lookup.extent is None else lookup.extent.at(grid, t)[1]
        if not len(known):
            raise NoOverlapError(self._no_label_message(grid, t))
        rows = lookup.rows[positions]
        bottom_up = np.argsort(lookup.rank[rows], kind="stable")
        top = rasterize_positions(shapes[bottom_up], grid, all_touched=self._rasterize.all_touched)
        outside = labels.unknown if labels.background is None else labels.background
        values = np.concatenate([[outside], labels.values[rows[bottom_up]]]).astype(mask.dtype)
        np.take(values, top, out=mask)
        np.take(np.isfinite(values) if values.dtype.kind == "f" else values != labels.unknown, top, out=valid)
        if lookup.extent is not None:
            beyond = rasterize_positions(known, grid) == 0
            mask[beyond], valid[beyond] = labels.unknown, False

    def _no_label_message(self, grid: Grid, t: slice) -> str:
        place = f"x, y = {tuple(round(v, 6) for v in grid.bounds)} ({grid.crs}) between {t.start} and {t.stop}"
        if self._extent is None:
            return f"No polygon at {place}; with background= or extent=, places without polygons are samples too."
        return f"No labels at {place}: it is outside their extent, {self._index.total_bounds}."

    def _polygon_lookup(self) -> PolygonLookup:
        if self._lookup is None or self._lookup.index is not self._index:
            has_extent, unchanged = self._extent is not None, self._index is self._made
            self._lookup = PolygonLookup(self._index, self._table, has_extent=has_extent, unchanged=unchanged)
        return self._lookup

    def has(self, query: Any, grid: Grid) -> bool:
        """Return whether labels are known anywhere at a chip."""
        lookup = self._polygon_lookup()
        return len((lookup.extent or lookup.polygons).at(grid, self._disambiguate_slice(query)[2])[0]) > 0

    # Combining ------------------------------------------------------------------------------------------------

    def __and__(self, other: GeoDataset) -> RasteretIntersection:
        """Both at once; without a `res` of their own, polygons take the other side's grid."""
        return RasteretIntersection(self._on_grid_of(other), other)

    def __or__(self, other: GeoDataset) -> RasteretUnion:
        """Either: pixels without a polygon are filled from the other side by validity."""
        return RasteretUnion(self._on_grid_of(other), other)

    def _on_grid_of(self, other: Any) -> PolygonDataset:
        if self._res != (0.0, 0.0) or not isinstance(other, GeoDataset) or 0 in other.res:
            return self
        polygons = copy.copy(self)
        polygons.crs, polygons.res = other.crs, other.res
        grid = getattr(other, "grid", None)
        x, y, _ = other.bounds
        polygons._corner = (x.start, y.stop) if grid is None else (grid.transform.c, grid.transform.f)
        return polygons


def _extent(extent: Any, crs: str, table: gpd.GeoDataFrame) -> BaseGeometry:
    """Return where labels are known, in the polygons' CRS."""
    if extent is None:
        return shapely.box(*table.total_bounds)
    own_crs = getattr(extent, "crs", None)
    areas = polygons_from(extent, crs if own_crs is None else None)
    return shapely.union_all(polygonal_each(transform_geometries(areas.geometries, areas.crs, crs)))


def _query_columns(queries: Sequence[Any], grids: Sequence[Grid], times: Sequence[slice]) -> dict[str, Sequence[Any]]:
    """Return place, AOI, label and draw of each sample."""
    slices = [snapped_slices(grid, t) for grid, t in zip(grids, times, strict=True)]
    columns: dict[str, Sequence[Any]] = {}
    if TENSOR_ONLY:
        columns["bounds"] = torch.stack([bounds_tensor(part) for part in slices]).unbind(0)
    else:
        columns["bounds"] = slices
        columns["crs"] = [pyproj_crs(str(grid.crs)) for grid in grids]
    transforms = [tuple(grid.transform)[:9] for grid in grids]
    columns["transform"] = torch.tensor(transforms, dtype=torch.float64).unbind(0)
    return columns | aoi_columns(queries)
