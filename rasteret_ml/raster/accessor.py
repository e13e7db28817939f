"""A record that can be read: the one place that speaks the whole sentence, from geometry to pixels."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import shapely
from tqdm import tqdm

from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.errors import (
    GeometryError,
    UsageError,
)
from rasteret_ml.geo.crs import LONLAT, crs_text, transform_geometries
from rasteret_ml.geo.geometries import GeometryArray, geometries_from, polygon_mask, polygons_from
from rasteret_ml.geo.grid import Grid, pixel_size
from rasteret_ml.geo.resample.warp import Resampling
from rasteret_ml.geo.window import Window
from rasteret_ml.raster.chip import Chip, to_tensors
from rasteret_ml.raster.execute import Engine, RequestLimiter, TileError, execute
from rasteret_ml.raster.outputs import to_geodataframe, to_xarray
from rasteret_ml.raster.plan import ChipPlan, plan_chip
from rasteret_ml.raster.raster_info import RasterInfo
from rasteret_ml.raster.reprojected_grid import reprojected_grid
from rasteret_ml.raster.source import BandSource, available_bands, find_source, locate_band
from rasteret_ml.storage.open import SignHook, SigningReader, open_reader
from rasteret_ml.storage.reader import as_reader

if TYPE_CHECKING:
    import geopandas as gpd
    import xarray as xr

__all__ = ["Output", "RasterAccessor"]

Output = Literal["xarray", "geopandas", "tensor"]
"""What `RasterAccessor.load_bands` returns."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _AoiPlan:
    chip: ChipPlan
    geometry: shapely.Geometry


class RasterAccessor:
    """One raster item of a Collection, ready to be read.

    Args:
        info: The row.
        data_source: Which band registry applies (`sentinel-2-l2a` makes `B02` find `blue`); "" = none.
    """

    def __init__(self, info: RasterInfo, data_source: str = "") -> None:
        self.info = info
        self.data_source = data_source
        self._sources: dict[str, BandSource] = {}

    @property
    def id(self) -> str:
        """The record's identifier."""
        return self.info.id

    @property
    def datetime(self) -> dt.datetime | None:
        """Acquisition in UTC, without tzinfo."""
        return self.info.datetime

    @property
    def bbox(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) in longitude/latitude."""
        return self.info.bbox

    @property
    def footprint(self) -> bytes | None:
        """Outline as WKB in longitude/latitude."""
        return self.info.footprint

    @property
    def geometry(self) -> bytes | None:
        """Alias of `footprint`."""
        return self.info.footprint

    @property
    def crs(self) -> int | str | None:
        """CRS of the pixels: an EPSG number, else WKT."""
        return self.info.crs

    @property
    def cloud_cover(self) -> float | None:
        """Percent; None = unknown."""
        return self.info.cloud_cover

    @property
    def assets(self) -> Mapping[str, Any]:
        """Asset mappings by key."""
        return self.info.assets

    @property
    def band_metadata(self) -> Mapping[str, Mapping[str, Any] | None]:
        """Stored structs by `{band}_metadata`."""
        return self.info.band_metadata

    @property
    def collection(self) -> str:
        """STAC collection of the item."""
        return self.info.collection

    @property
    def available_bands(self) -> list[str]:
        """Bands that can be read: those with metadata and an address, sorted."""
        return available_bands(self.info, self.data_source)

    def __repr__(self) -> str:
        when = "undated" if self.datetime is None else f"{self.datetime:%Y-%m-%d}"
        return f"RasterAccessor({self.id!r}, {when}, bands={self.available_bands})"

    def intersects(self, geometry: Any) -> bool:
        """Whether the bounding boxes overlap; False where the record has none. `geometry` is in lon/lat."""
        if self.bbox is None:
            return False
        bounds = geometries_from(geometry, LONLAT).geometries[0].bounds
        return bool(shapely.box(*self.bbox).intersects(shapely.box(*bounds)))

    def try_get_band_cog_metadata(self, band_code: str) -> tuple[CogMetadata | None, str | None, int | None]:
        """Metadata, address and band index of a band, or three Nones where any of it is missing."""
        return locate_band(self.info, self.data_source, band_code)

    def source(self, band_code: str, nodata: int | float | None = None) -> BandSource:
        """A band, found and readable; `nodata` overrides the file's.

        Raises:
            UnknownBandError: the record has no such band; the message lists those it has.
        """
        held = self._sources.get(band_code)
        if held is None:
            held = self._sources[band_code] = find_source(self.info, self.data_source, band_code)
        return held if nodata is None else replace(held, nodata=nodata, nodata_given=True)

    def grid(self, band_code: str, level: int = 0) -> Grid:
        """The native grid of a band, or of its overview number `level`.

        Raises:
            UsageError: the band has no such overview.
        """
        levels = self.source(band_code).metadata.levels
        if not 0 <= level < len(levels):
            raise UsageError(
                f"Record {self.id}, band {band_code}: there are levels 0 to {len(levels) - 1}, not {level}."
            )
        return levels[level].grid

    # Reading by grid: what the dataset uses -------------------------------------------------------------

    def plan(
        self,
        grid: Grid,
        band_codes: Sequence[str],
        *,
        resampling: Resampling | None = None,
        nodata: int | float | None = None,
        overviews: bool = True,
        wrap: bool = True,
        categories: bool = False,
        level: int | None = None,
    ) -> ChipPlan:
        """Plan the read of a grid (pure, see `plan_chip`). `execute` takes plans of many records at once."""
        sources = [self.source(code, nodata) for code in band_codes]
        return plan_chip(sources, grid, resampling, overviews=overviews, wrap=wrap, categories=categories, level=level)

    async def read_window(
        self,
        window: Window | tuple[int, int, int, int],
        band_codes: Sequence[str],
        *,
        level: int = 0,
        resampling: Resampling | None = None,
        nodata: int | float | None = None,
        backend: Any = None,
    ) -> Chip:
        """Read a pixel window; needs no CRS. Outside the image every pixel is invalid.

        Args:
            window: On the first band's grid: a `Window`, or (row, column, height, width). May leave the image.
            band_codes: Bands along C; a band of another resolution is resampled onto the first one's grid.
            level: Which grid `window` counts in: 0 = full resolution, 1 = the first overview …
            resampling: As for `load_bands`.
            nodata: As for `load_bands`.
            backend: As for `load_bands`.
        """
        if not isinstance(window, Window):
            row, col, height, width = window
            window = Window(row=row, col=col, height=height, width=width)
        grid = self.grid(_checked(band_codes)[0], level).window(window)
        plan = self.plan(grid, band_codes, resampling=resampling, nodata=nodata, wrap=False, level=level)
        chips, _ = await self._execute([plan], backend, 50, None, None, False)
        return to_tensors(chips[0])

    # Reading by geometry --------------------------------------------------------------------------------

    def plan_geometries(
        self,
        geometries: GeometryArray,
        band_codes: Sequence[str],
        *,
        target_crs: Any = None,
        res: float | tuple[float, float] | None = None,
        boundless: bool = True,
        resampling: Resampling | None = None,
        nodata: int | float | None = None,
    ) -> list[_AoiPlan | None]:
        """Plan one chip per geometry (pure), None where it does not touch the raster.

        A chip is the smallest pixel window around its geometry, on the first band's grid or, with `target_crs` and
        `res`, on that grid reprojected, with other pixels; `boundless=False` cuts it at the raster's edge.
        """
        native = self.grid(_checked(band_codes)[0])
        if native.crs is None:
            raise UsageError(f"Record {self.id} has no CRS; read it with `read_window`, or build with crs=.")
        if self.source(band_codes[0]).metadata.transform is None:
            raise UsageError(
                f"Record {self.id} is not georeferenced (no transform; ground control points are not applied); read "
                "it with `read_window`, or warp it first: gdalwarp in.tif out.tif"
            )
        base = native if target_crs is None else reprojected_grid(native, crs_text(target_crs))
        size = pixel_size(res)
        base = base if size is None else base.with_res(size)
        shapes = transform_geometries(geometries.geometries, geometries.crs, str(base.crs), near=base.bounds)
        footprint = base.footprint
        plans: list[_AoiPlan | None] = []
        for shape in shapes:
            window: Window | None = None
            if shapely.intersects(shape, footprint) and not shapely.touches(shape, footprint):
                window = base.window_around(shape.bounds)
                window = window if boundless else _kept_to(base, window)
            if window is None:
                plans.append(None)
                continue
            chip = self.plan(base.window(window), band_codes, resampling=resampling, nodata=nodata)
            plans.append(_AoiPlan(chip=chip, geometry=shape))
        return plans

    async def load_bands(
        self,
        geometries: Any,
        band_codes: Sequence[str],
        max_concurrent: int = 50,
        for_xarray: bool = True,
        backend: Any = None,
        target_crs: Any = None,
        *,
        res: float | tuple[float, float] | None = None,
        geometry_crs: Any = None,
        output: Output | None = None,
        all_touched: bool = False,
        boundless: bool | None = None,
        resampling: Resampling | None = None,
        nodata: int | float | None = None,
        sign: SignHook | None = None,
        progress: bool | None = None,
        failures: list[TileError] | None = None,
    ) -> xr.Dataset | gpd.GeoDataFrame | list[Chip | None]:
        """Read bands for many geometries, all together.

        Args:
            geometries: Polygons as a GeoArrow array (WKB, shapely, GeoSeries, GeoJSON and bounding boxes do
                as well).
            band_codes: Bands to read; along C in tensors.
            max_concurrent: Range requests in flight.
            for_xarray: True = `xarray.Dataset`, False = `geopandas.GeoDataFrame`; `output` overrides it.
            backend: A reader from `open_reader`, an obstore store, or any object with async
                `get_range(url, start, length)`; None = a reader of its own, closed afterwards.
            target_crs: Reproject to this CRS (any form); None = the record's own grid, pixels untouched.
            res: Pixel size in CRS units, one number or (x, y); coarser ones are read from overviews. None = the
                first band's own.
            geometry_crs: CRS of the geometries where they do not carry one; default longitude/latitude.
            output: "xarray", "geopandas" or "tensor".
            all_touched: Pixels that a geometry touches are inside, not only those whose centre is.
            boundless: Whether a chip keeps its geometry's whole window past the raster's edge. Default: yes
                for tensors, no for tables.
            resampling: Kernel where grids differ. Default nearest for colour tables and bits, else bilinear;
                categories want "nearest".
            nodata: Overrides the files' declared nodata.
            sign: Called with each href just before it is read; its answer is never stored.
            progress: Progress bar; default in a terminal only.
            failures: A list: tiles that cannot be read are appended to it and come back as invalid fill.
                None = the first failure raises.

        Returns:
            tensor: a list aligned with `geometries` of `Chip`s (data `[C, H, W]` native dtype, valid
            `[C, H, W]`, inside `[H, W]`), None where a geometry misses the raster. xarray: one Dataset on the
            record's grid around all geometries, a variable `[time, y, x]` per band. geopandas: a row per
            geometry and band. Both tables fill outside the geometries with nodata; where none is declared,
            integers become float32 with NaN, if any pixel needs it.

        Raises:
            GeometryError: not polygons, or none of them touches the record (for the two tables).
            UnknownBandError: a band that the record lacks.
            ReadError: a tile could not be read.
        """
        kind: Output = output or ("xarray" if for_xarray else "geopandas")
        if kind not in ("xarray", "geopandas", "tensor"):
            raise UsageError(f"output must be 'xarray', 'geopandas' or 'tensor', not {kind!r}.")
        array = polygons_from(geometries, geometry_crs)
        plans = self.plan_geometries(
            array,
            band_codes,
            target_crs=target_crs,
            res=res,
            boundless=kind == "tensor" if boundless is None else boundless,
            resampling=resampling,
            nodata=nodata,
        )
        wanted = [p for p in plans if p is not None]
        if not wanted and kind != "tensor":
            raise GeometryError(f"Record {self.id}: none of the {len(array)} geometries touches its raster.")
        bar = sys.stderr.isatty() if progress is None else progress
        chips, failed = await self._execute(
            [p.chip for p in wanted], backend, max_concurrent, sign, bar, failures is not None
        )
        if failures is not None:
            failures.extend(failed)
        masked = iter(
            [
                replace(chip, inside=polygon_mask(plan.geometry, chip.grid, all_touched=all_touched))
                for chip, plan in zip(chips, wanted, strict=True)
            ]
        )
        aligned = [None if plan is None else next(masked) for plan in plans]
        if kind == "tensor":
            return [None if chip is None else to_tensors(chip) for chip in aligned]
        return to_xarray(self.info, aligned) if kind == "xarray" else to_geodataframe(self.info, aligned, array)

    async def _execute(
        self,
        plans: list[ChipPlan],
        backend: Any,
        max_concurrent: int,
        sign: SignHook | None,
        bar: bool | None,
        allow_failures: bool,
    ) -> tuple[tuple[Chip, ...], tuple[TileError, ...]]:
        if max_concurrent < 1:
            raise UsageError(f"max_concurrent must be at least 1, not {max_concurrent}.")
        async with AsyncExitStack() as stack:
            reader = as_reader(backend) if backend is not None else await stack.enter_async_context(open_reader())
            tiles = sum(len(band.tiles) + len(band.mask_tiles) for plan in plans for band in plan.bands)
            shown = stack.enter_context(tqdm(total=tiles, unit="tile", desc=self.id, disable=not bar))
            engine = Engine(
                reader=reader if sign is None else SigningReader(reader, sign),
                slots=RequestLimiter(max_concurrent),
                progress=shown.update,
            )
            result = await execute(plans, engine, allow_failures=allow_failures)
        return result.chips, result.failures


def _checked(band_codes: Sequence[str]) -> Sequence[str]:
    if isinstance(band_codes, str) or not len(band_codes):
        raise UsageError(f"band_codes is a non-empty list of band names, not {band_codes!r}.")
    return band_codes


def _kept_to(grid: Grid, window: Window) -> Window | None:
    """The part of a window that lies on a raster; one that goes round the globe has no left and right edge."""
    extent = Window(row=0, col=0, height=grid.height, width=grid.width)
    if grid.turn is not None and grid.width >= grid.turn:
        extent = replace(extent, col=window.col, width=window.width)
    return window.intersection(extent)
