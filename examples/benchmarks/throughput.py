"""Measure the library against other readers and against the limit of network and CPU; see README.md in this folder.

python examples/benchmarks/throughput.py latency --rounds 5
python examples/benchmarks/throughput.py all
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench import Bench
    from report import Section


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "command", choices=[*COMMANDS, "all", "trial"], help="measurement; all of them are written to --out"
    )
    options.add_argument(
        "--data", type=Path, help="folder of the generated files (default: in the folder for temporary files)"
    )
    options.add_argument("--scenes", type=int, default=4, help="number of scenes of 4 bands")
    options.add_argument("--size", type=int, default=6144, help="rows and columns of a scene")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", nargs="+", default=["*"], help="patterns of the labels of rows to measure")
    options.add_argument("--rounds", type=int, default=5, help="how often to measure every reader")
    options.add_argument("--batch", type=int, default=16, help="chips in a batch")
    options.add_argument("--batches", type=int, default=40, help="timed batches, after the --warm first ones")
    options.add_argument(
        "--slow-batches", type=int, default=4, help="timed batches of torchgeo; half of that at 100 ms"
    )
    options.add_argument("--warm", type=int, default=4, help="batches before the clock starts")
    options.add_argument("--tail", type=int, default=16, help="batches after the timed ones, to keep pipelines full")
    options.add_argument("--compare", type=int, default=4, help="batches whose pixels are first compared with GDAL's")
    options.add_argument("--delays", nargs="+", default=["0", "30", "100"], help="delays before each response, ms")
    options.add_argument("--cache-mb", type=int, default=256, help="tile cache per process in rows with a cache, MB")
    options.add_argument("--epoch", type=int, default=8192, help="chips in an epoch of the library's sampler")
    options.add_argument(
        "--localities",
        nargs="+",
        default=["8x3", "16x1", "16x2", "16x3", "32x3", "16x3x2"],
        help="localities to compare: blocks x tiles x lanes",
    )
    options.add_argument("--locality", help="locality in the latency table and for targets (default: the library's)")
    options.add_argument("--block", type=int, default=1, help="side of the blocks counted by locality, tiles")
    options.add_argument("--memory-batches", type=int, default=2000, help="batches of the memory measurement")
    options.add_argument("--headers", type=int, default=2000, help="files whose headers are read")
    options.add_argument(
        "--records", type=int, default=100_000, help="records of the first of two synthetic Collections"
    )
    options.add_argument("--dates", type=int, default=15, help="dates of the time series")
    options.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("README.md"), help="file that all updates"
    )
    return options


def main() -> None:
    """Measure, print tables and, for "all", write them."""
    args = parser().parse_args()
    if args.command == "trial":
        import trial

        trial.main()
    import bench
    import report
    import scenes
    import server

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # run the exit handlers, which stop the server
    layout = scenes.Layout(scenes=args.scenes, size=args.size, seed=args.seed)
    folder = scenes.prepare(args.data, layout, os.cpu_count() or 1)
    start, sections = time.time(), []
    scratch = Path(tempfile.mkdtemp(prefix="rasteret_bench_"))
    delays = [0, 30, 100, *map(int, args.delays)]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        run = bench.Bench(args, layout, folder, scratch, stack.enter_context(server.Server(folder, delays)))
        for name in COMMANDS if args.command == "all" else [args.command]:
            bench.log(f"== {name}")
            for section in measure(name, run):
                print(section.markdown(), flush=True)
                sections.append(section)
    print(report.machine())
    if args.command == "all":
        command = f"`throughput.py {' '.join(sys.argv[1:])}`, {(time.time() - start) / 60:.0f} minutes."
        report.write(args.out, sections, command)


def measure(name: str, run: Bench) -> list[Section]:
    """Run one measurement."""
    sections: list[Section] = getattr(importlib.import_module(COMMANDS[name]), name)(run)
    return sections


COMMANDS = {
    "latency": "speed",
    "local": "speed",
    "workers": "speed",
    "locality": "batch_diversity",
    "startup": "startup",
    "headers": "costs",
    "requests": "costs",
    "memory": "costs",
    "series": "costs",
    "watching": "watching",
}
"""Measurements and their modules, imported only when needed so that trials and spawned workers start faster."""


if __name__ == "__main__":
    main()
