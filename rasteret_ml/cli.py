"""The `rasteret-ml` command: build a Collection or summarize one. Only this file prints; the library logs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import RasteretError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, or 1 if it failed or `build` skipped files."""
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
    build_parser = commands.add_parser("build", help="read headers once and write a Collection")
    build_parser.add_argument("source", nargs="+", help="GeoTIFFs, globs, folders, URLs, .txt lists, STAC item JSON")
    build_parser.add_argument("-o", "--out", required=True, help="name.parquet, or a folder for hive partitions")
    build_parser.add_argument("--bands", nargs="+", help="band names; of one file per band, the words in file names")
    build_parser.add_argument("--undated", action="store_true", help="do not read dates from file names")
    build_parser.add_argument("--strict", action="store_true", help="stop at the first file that cannot be read")
    info_parser = commands.add_parser("info", help="summarize a Collection")
    info_parser.add_argument("collection")
    return parser


def _build(options: argparse.Namespace) -> int:
    collection = build(
        options.source,
        options.out,
        bands=options.bands,
        datetime=None if options.undated else "filename",
        strict=options.strict,
    )
    print(f"{options.out}: {collection.report}")
    return 1 if getattr(collection.report, "failures", ()) else 0


def _info(options: argparse.Namespace) -> int:
    collection = Collection.open(options.collection)
    dates = sorted(d for d in collection.to_table(["datetime"])["datetime"].to_pylist() if d is not None)
    print(f"records   {len(collection)}")
    print(f"bands     {', '.join(collection.bands)}")
    print(f"crs       {', '.join(collection.crs) or 'none'}")
    print(f"bounds    {collection.bounds}")
    print(f"dates     {f'{dates[0]} to {dates[-1]}' if dates else 'none'}")
    return 0
