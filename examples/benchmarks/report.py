"""Markdown tables of results, the machine they were measured on, and the README that they are written to."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

_MARK = "<!-- `throughput.py all` writes everything below this line. -->"
_LIBRARIES = ("torch", "torchgeo", "rasterio", "numpy", "pyarrow", "aiohttp", "imagecodecs", "async_geotiff", "obstore")


@dataclass
class Section:
    """Results of a measurement."""

    title: str
    """Heading."""
    intro: str = ""
    """What is measured and how."""
    columns: Sequence[str] = ()
    """Column headings of the table."""
    rows: list[Sequence[str]] = field(default_factory=list)
    """Cells of the table."""
    notes: list[str] = field(default_factory=list)
    """List items below the table: skipped rows, targets."""

    def target(self, quantity: str, value: float, target: float, *, maximum: bool = False) -> None:
        """Note a value and its target, a minimum or a maximum; skip values that were not measured (NaN)."""
        if value != value:
            return
        met = value <= target if maximum else value >= target
        bound = f"at {'most' if maximum else 'least'} {number(target)}"
        self.notes.append(f"{'met' if met else '**missed**'}: {quantity}: {number(value)} (target: {bound})")

    def markdown(self) -> str:
        """Return the section as Markdown."""
        lines = [f"### {self.title}", ""]
        lines += [self.intro, ""] if self.intro else []
        if self.rows:
            lines += [f"| {' | '.join(self.columns)} |", "|" + " --- |" * len(self.columns)]
            lines += [f"| {' | '.join(row)} |" for row in self.rows] + [""]
        lines += [f"- {note}" for note in self.notes] + ([""] if self.notes else [])
        return "\n".join(lines)


def number(value: float) -> str:
    """Format a number with three significant digits; "-" for NaN."""
    if value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Format the median and, of several values, the minimum and maximum."""
    if not values:
        return "-"
    middle = number(median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def middle(values: Sequence[float]) -> float:
    """Return the median; NaN without values."""
    return median(values) if values else float("nan")


def machine() -> str:
    """Describe the machine and the versions of libraries in Markdown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {sys.version.split()[0]}"]
    for name in _LIBRARIES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        versions.append(f"{name} {getattr(module, '__version__', '?')}")
        if name == "rasterio":
            versions.append(f"GDAL {module.__gdal_version__}")
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()}; {', '.join(versions)}.\n"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, sections: Sequence[Section], command: str) -> None:
    """Replace everything below the mark in a README by results."""
    above = path.read_text(encoding="utf-8").partition(_MARK)[0] if path.exists() else "# Benchmarks\n\n"
    body = "\n".join(section.markdown() for section in sections)
    text = f"{above.rstrip()}\n\n{_MARK}\n\n## Results\n\n{machine()}\n{command}\n\n{body}"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
