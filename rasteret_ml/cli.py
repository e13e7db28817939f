"""Step 22. `rasteret-ml`: build a Collection, look at one. The library logs; only this file prints."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import RasteretError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 where it failed or (build) left files out."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        return _build(options) if options.command == "build" else _info(options)
    except RasteretError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rasteret-ml", description="Collections of cloud-hosted GeoTIFFs.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="read headers once and write a Collection")
    making.add_argument("source", nargs="+", help="GeoTIFF paths, globs, folders, URLs, .txt lists, STAC item JSON")
    making.add_argument("-o", "--out", required=True, help="name.parquet, or a folder for hive partitions")
    making.add_argument("--bands", nargs="+", help="band names; for one file per band, the words in their names")
    making.add_argument("--undated", action="store_true", help="do not read dates from file names")
    making.add_argument("--strict", action="store_true", help="stop at the first file that cannot be read")
    looking = commands.add_parser("info", help="say what a Collection holds")
    looking.add_argument("collection")
    return parser


def _build(options: argparse.Namespace) -> int:
    made = build(
        options.source,
        options.out,
        bands=options.bands,
        datetime=None if options.undated else "filename",
        strict=options.strict,
    )
    print(f"{options.out}: {made.report}")
    return 1 if getattr(made.report, "failures", ()) else 0


def _info(options: argparse.Namespace) -> int:
    found = Collection.open(options.collection)
    dates = sorted(d for d in found.to_table(["datetime"])["datetime"].to_pylist() if d is not None)
    print(f"records   {len(found)}")
    print(f"bands     {', '.join(found.bands)}")
    print(f"crs       {', '.join(found.crs) or 'none'}")
    print(f"bounds    {found.bounds}")
    print(f"dates     {f'{dates[0]} to {dates[-1]}' if dates else 'none'}")
    return 0
