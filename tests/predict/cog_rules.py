"""What makes a GeoTIFF cloud optimised, read from its own bytes: the rules of GDAL's COG layout, without GDAL."""

from __future__ import annotations

from pathlib import Path

import tifffile

LEADER_LITTLE_ENDIAN = 4
"""Bytes before each tile that repeat its size."""


def broken_rules(path: str | Path) -> list[str]:
    """Rules that a file breaks; none for a COG.

    (GDAL's `validate_cloud_optimized_geotiff.py` and the description of its COG driver.)
    """
    broken: list[str] = []
    data = Path(path).read_bytes()
    with tifffile.TiffFile(path) as file:
        header = 16 if file.is_bigtiff else 8
        if not data[header:].startswith(b"GDAL_STRUCTURAL_METADATA_SIZE="):
            broken.append("no structural metadata after the header")
        if b"LAYOUT=IFDS_BEFORE_DATA" not in data[:300] or b"BLOCK_ORDER=ROW_MAJOR" not in data[:300]:
            broken.append("layout not declared")
        pages = list(file.pages)
        offsets = [page.offset for page in pages]
        if offsets != sorted(offsets):
            broken.append("directories out of order")
        full = pages[0]
        if full.is_reduced:
            broken.append("an overview before the image")
        widths = [page.imagewidth for page in pages]
        if any(not page.is_reduced for page in pages[1:]) or widths != sorted(widths, reverse=True):
            broken.append("overviews not marked or not in order of size")
        tile = max(full.tilewidth, full.tilelength) if full.is_tiled else 0
        if max(pages[-1].imagewidth, pages[-1].imagelength) > 2 * tile:
            broken.append("overviews are missing")
        stored: list[int] = []
        for page in pages:
            if not page.is_tiled:
                broken.append("strips")
            own = [(at, size) for at, size in zip(page.dataoffsets, page.databytecounts, strict=True) if size]
            places = [at for at, _ in own]
            if places != sorted(places):
                broken.append("tiles not row by row")
            if places and min(places) < max(offsets):
                broken.append("pixels before directories")
            for at, size in own:
                if int.from_bytes(data[at - LEADER_LITTLE_ENDIAN : at], "little") != size:
                    broken.append(f"no leader before the tile at {at}")
                    break
            stored.append(min(places, default=0))
        if sorted(filter(None, stored), reverse=True) != list(filter(None, stored)):
            broken.append("the image's pixels come before its overviews'")
    return broken
