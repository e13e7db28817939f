"""A record that can be read: geometries or windows to pixels."""

from __future__ import annotations

import datetime as dt
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import shapely
from tqdm import tqdm

from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.geo.crs import LONLAT, crs_text, transform_geometries
from rasteret_ml.geo.geometries import GeometryArray, geometries_from, polygons_from
from rasteret_ml.geo.grid import Bounds, Grid, Window, pixel_size
from rasteret_ml.geo.resample.positions import Resampling
from rasteret_ml.raster.chip import Chip, to_tensors
from rasteret_ml.raster.engine import ReadConfig
from rasteret_ml.raster.execute import TileError
from rasteret_ml.raster.outputs import to_geodataframe, to_xarray
from rasteret_ml.raster.plan import ChipPlan, plan_chip
from rasteret_ml.raster.raster_info import RasterInfo
from rasteret_ml.raster.read import OnError, mask_geometry
from rasteret_ml.raster.reprojected_grid import reprojected_grid
from rasteret_ml.raster.requests import ChipRequest, ChipRules
from rasteret_ml.raster.source import BandSource, available_bands, find_source, locate_band, validate_bands
from rasteret_ml.raster.worker_loop import read_in_process
from rasteret_ml.storage.open import SignHook

if TYPE_CHECKING:
    import geopandas as gpd
    import xarray as xr

Output = Literal["xarray", "geopandas", "tensor"]  #: What `RasterAccessor.load_bands` returns.


def _info_field(name: str, doc: str) -> Any:
    return property(operator.attrgetter(f"info.{name}"), doc=doc)


class RasterAccessor:
    """One raster item of a Collection, ready to be read.

    Args:
        info: The row.
        data_source: Which band registry applies (with `sentinel-2-l2a`, `B02` finds `blue`); "" = none.

    Example:
        >>> record = next(iter(collection.iterate_records()))  # doctest: +SKIP
        >>> chips = await RasterAccessor(record).load_bands(fields, ["B04", "B08"], output="tensor")  # doctest: +SKIP
    """

    id: str = _info_field("id", "The record's identifier.")
    datetime: dt.datetime | None = _info_field("datetime", "Acquisition time in UTC, without tzinfo.")
    bbox: Bounds | None = _info_field("bbox", "(xmin, ymin, xmax, ymax) in longitude/latitude.")
    footprint: bytes | None = _info_field("footprint", "Outline as WKB in longitude/latitude.")
    geometry: bytes | None = _info_field("footprint", "Alias of `footprint`.")
    crs: int | str | None = _info_field("crs", "CRS of the pixels: an EPSG number, else WKT.")
    cloud_cover: float | None = _info_field("cloud_cover", "Percent; None = unknown.")
    assets: Mapping[str, Any] = _info_field("assets", "Asset mappings by key.")
    band_metadata: Mapping[str, Mapping[str, Any] | None] = _info_field(
        "band_metadata", "Stored structs by `{band}_metadata`."
    )
    collection: str = _info_field("collection", "STAC collection of the item.")

    def __init__(self, info: RasterInfo, data_source: str = "") -> None:
        self.info = info
        self.data_source = data_source
        self._sources: dict[str, BandSource] = {}

    @property
    def available_bands(self) -> list[str]:
        """Bands with metadata and an address, sorted."""
        return available_bands(self.info, self.data_source)

    def __repr__(self) -> str:
        when = "undated" if self.datetime is None else f"{self.datetime:%Y-%m-%d}"
        return f"RasterAccessor({self.id!r}, {when}, bands={self.available_bands})"

    def intersects(self, geometry: Any) -> bool:
        """Return whether the bounding boxes overlap; False where the record has none. `geometry` is in lon/lat."""
        if self.bbox is None:
            return False
        bounds = geometries_from(geometry, LONLAT).geometries[0].bounds
        return bool(shapely.box(*self.bbox).intersects(shapely.box(*bounds)))

    def try_get_band_cog_metadata(self, band_code: str) -> tuple[CogMetadata | None, str | None, int | None]:
        """Return metadata, address and band index of a band, or three Nones where any of them is missing."""
        return locate_band(self.info, self.data_source, band_code)

    def source(self, band_code: str, nodata: int | float | None = None) -> BandSource:
        """Locate a band; `nodata` overrides the file's.

        Raises:
            UnknownBandError: the record has no such band; the message lists the bands it has.
        """
        source = self._sources.get(band_code)
        if source is None:
            source = self._sources[band_code] = find_source(self.info, self.data_source, band_code)
        return source if nodata is None else replace(source, nodata=nodata, nodata_given=True)

    def grid(self, band_code: str, level: int = 0) -> Grid:
        """Return the native grid of a band, or of its overview number `level`.

        Raises:
            UsageError: the band has no such overview.
        """
        levels = self.source(band_code).metadata.levels
        if not 0 <= level < len(levels):
            raise UsageError(
                f"Record {self.id}, band {band_code}: level must be from 0 to {len(levels) - 1}, got {level}."
            )
        return levels[level].grid

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
        """Plan the read of a grid; see `plan_chip`."""
        sources = [self.source(code, nodata) for code in band_codes]
        return plan_chip(sources, grid, resampling, overviews=overviews, wrap=wrap, categories=categories, level=level)

    def requests(
        self,
        geometries: GeometryArray,
        rules: ChipRules,
        *,
        target_crs: Any = None,
        res: float | tuple[float, float] | None = None,
        boundless: bool = True,
        all_touched: bool = False,
    ) -> list[ChipRequest | None]:
        """Plan one chip per geometry; None where a geometry does not touch the raster.

        A chip is the smallest pixel window around its geometry, on the first band's grid or, with `target_crs` and
        `res`, on that grid reprojected and with other pixels; `boundless=False` clips it to the raster.

        Raises:
            UsageError: the record has no CRS or no transform.
        """
        native = self.grid(validate_bands(rules.bands)[0])
        if native.crs is None:
            raise UsageError(f"Record {self.id} has no CRS; read it with `read_window`, or build with crs=.")
        if self.source(rules.bands[0]).metadata.transform is None:
            raise UsageError(
                f"Record {self.id} is not georeferenced (no transform; ground control points are not applied); read "
                "it with `read_window`, or warp it first: gdalwarp in.tif out.tif"
            )
        base = native if target_crs is None else reprojected_grid(native, crs_text(target_crs))
        size = pixel_size(res)
        base = base if size is None else base.with_res(size)
        shapes = transform_geometries(geometries.geometries, geometries.crs, str(base.crs), near=base.bounds)
        footprint = base.footprint
        requests: list[ChipRequest | None] = [None] * len(shapes)
        for i, shape in enumerate(shapes):
            if not shapely.intersects(shape, footprint) or shapely.touches(shape, footprint):
                continue
            around = base.window_around(shape.bounds)
            window = around if boundless else _clip_window(base, around)
            if window is not None:
                grid = base.window(window)
                requests[i] = ChipRequest.plan(grid, [self], rules, geometry=shape, all_touched=all_touched)
        return requests

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
        """Read a pixel window; needs no CRS. Pixels outside the image are invalid.

        Args:
            window: On the first band's grid: a `Window`, or (row, column, height, width). May leave the image.
            band_codes: Bands along C; a band of another resolution is resampled onto the first one's grid.
            level: The resolution that `window` counts in: 0 = full, 1 = the first overview …
            resampling: As for `load_bands`.
            nodata: As for `load_bands`.
            backend: As for `load_bands`.
        """
        if not isinstance(window, Window):
            row, col, height, width = window
            window = Window(row=row, col=col, height=height, width=width)
        grid = self.grid(validate_bands(band_codes)[0], level).window(window)
        bands = tuple(band_codes)
        rules = ChipRules(bands=bands, resampling=resampling, nodata=nodata, wrap=False, level=level)
        result = await read_in_process([ChipRequest.plan(grid, [self], rules)], ReadConfig(backend=backend))
        (chip,) = result.chips
        assert chip is not None
        return to_tensors(chip)

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

        In a process that reads with datasets or loaders, this uses their connections, tile cache and request limit.

        Args:
            geometries: Polygons as a GeoArrow array, WKB, shapely geometries, a GeoSeries, GeoJSON or bounding boxes.
            band_codes: Bands to read; along C in tensors.
            max_concurrent: Range requests in flight.
            for_xarray: True = `xarray.Dataset`, False = `geopandas.GeoDataFrame`; `output` overrides it.
            backend: A reader from `open_reader`, an obstore store, or any object with async
                `get_range(url, start, length)`; None = the library's own reader.
            target_crs: Reproject to this CRS (any form); None = the record's own grid, pixels untouched.
            res: Pixel size in CRS units, one number or (x, y); coarser pixels are read from overviews. None = the first
                band's own.
            geometry_crs: CRS of geometries that do not carry one; default longitude/latitude.
            output: "xarray", "geopandas" or "tensor".
            all_touched: Whether pixels that a geometry touches are inside, not only those whose centre is.
            boundless: Whether a chip keeps its geometry's whole window beyond the raster's edge. Default: yes for
                tensors, no for tables.
            resampling: Kernel where grids differ. Default nearest for colour tables and bits, else bilinear; use
                "nearest" for classes.
            nodata: Overrides the files' nodata.
            sign: Called with each href just before it is read; the result is never stored.
            progress: Show a progress bar; default in a terminal only.
            failures: A list that receives a `TileError` for each tile that cannot be read; its pixels are then
                invalid. None = the first failure raises.

        Returns:
            tensor: a list aligned with `geometries` of `Chip`s (data `[C, H, W]` of native dtype, valid `[C, H, W]`,
            inside `[H, W]`), None where a geometry misses the raster. xarray: one Dataset on the record's grid around
            all geometries, with a variable `[time, y, x]` per band. geopandas: a row per geometry and band. Both tables
            fill pixels outside the geometries with nodata; where no nodata is declared, integers become float32 with
            NaN if any pixel needs it.

        Raises:
            GeometryError: the geometries are not polygons, or (for the two tables) none touches the record.
            UnknownBandError: the record has no such band.
            ReadError: a tile could not be read.
        """
        kind: Output = output or ("xarray" if for_xarray else "geopandas")
        if kind not in ("xarray", "geopandas", "tensor"):
            raise UsageError(f"output must be 'xarray', 'geopandas' or 'tensor', got {kind!r}.")
        config = ReadConfig(sign=sign, backend=backend, max_concurrent=max_concurrent)
        array = polygons_from(geometries, geometry_crs)
        requests = self.requests(
            array,
            ChipRules(bands=tuple(validate_bands(band_codes)), resampling=resampling, nodata=nodata),
            target_crs=target_crs,
            res=res,
            boundless=kind == "tensor" if boundless is None else boundless,
            all_touched=all_touched,
        )
        if not any(requests) and kind != "tensor":
            raise GeometryError(f"Record {self.id}: none of the {len(array)} geometries touches its raster.")
        chips = await self._read(requests, config, progress, failures)
        if kind == "tensor":
            return [None if chip is None else to_tensors(chip) for chip in chips]
        return to_xarray(self.info, chips) if kind == "xarray" else to_geodataframe(self.info, chips, array)

    async def _read(
        self,
        requests: Sequence[ChipRequest | None],
        config: ReadConfig,
        progress: bool | None,
        failures: list[TileError] | None,
    ) -> list[Chip | None]:
        """Read requests with a progress bar; failed tiles go to `failures`, with the positions of their geometries."""
        show = sys.stderr.isatty() if progress is None else progress
        planned = {i: request for i, request in enumerate(requests) if request is not None}
        bands = [band for request in planned.values() for plan in request.plans for band in plan.bands]
        total = sum(len(band.tiles) + len(band.mask_tiles) for band in bands)
        with tqdm(total=total, unit="tile", desc=self.id, disable=not show) as bar:
            on_error: OnError = "raise" if failures is None else "keep"
            result = await read_in_process(list(planned.values()), config, on_error=on_error, progress=bar.update)
        if failures is not None:
            positions = list(planned)
            errors = {id(error): error for found in result.errors.values() for error in found}
            for error in errors.values():
                assert isinstance(error, TileError)
                failures.append(replace(error, positions=tuple(positions[i] for i in error.positions)))
        chips: list[Chip | None] = [None] * len(requests)
        for (i, request), chip in zip(planned.items(), result.chips, strict=True):
            chips[i] = None if chip is None else mask_geometry(request, chip)
        return chips


def _clip_window(grid: Grid, window: Window) -> Window | None:
    """Return the part of a window that lies on a raster; one around the globe has no left and right edge."""
    extent = Window(row=0, col=0, height=grid.height, width=grid.width)
    if grid.turn is not None and grid.width >= grid.turn:
        extent = replace(extent, col=window.col, width=window.width)
    return window.intersection(extent)
