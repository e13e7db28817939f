"""Tables in Markdown, the machine, and the README that holds them."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

_MARK = "<!-- Everything below this line is written by `throughput.py all`. -->"
_LIBRARIES = ("torch", "torchgeo", "rasterio", "numpy", "pyarrow", "aiohttp", "imagecodecs", "async_geotiff", "obstore")


@dataclass
class Section:
    """A measurement's results."""

    title: str
    """Heading."""
    intro: str = ""
    """What was measured and how."""
    columns: Sequence[str] = ()
    """Heads of the table."""
    rows: list[Sequence[str]] = field(default_factory=list)
    """Its rows."""
    notes: list[str] = field(default_factory=list)
    """Lines below it: rows skipped, targets."""

    def target(self, what: str, value: float, wanted: float, *, most: bool = False) -> None:
        """Note a figure beside what was wanted of it, at least or at most; nothing where it was not measured (NaN)."""
        if value != value:
            return
        met = value <= wanted if most else value >= wanted
        sign = "at most" if most else "at least"
        self.notes.append(f"{'met' if met else '**missed**'}: {what} {number(value)} ({sign} {number(wanted)})")

    def markdown(self) -> str:
        """The section as Markdown."""
        lines = [f"### {self.title}", ""]
        lines += [self.intro, ""] if self.intro else []
        if self.rows:
            lines += [f"| {' | '.join(self.columns)} |", "|" + " --- |" * len(self.columns)]
            lines += [f"| {' | '.join(row)} |" for row in self.rows] + [""]
        lines += [f"- {note}" for note in self.notes] + ([""] if self.notes else [])
        return "\n".join(lines)


def number(value: float) -> str:
    """Three figures that count."""
    if value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Median, and the smallest and largest where there are several."""
    if not values:
        return "-"
    middle = number(median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def middle(values: Sequence[float]) -> float:
    """Median; NaN of nothing."""
    return median(values) if values else float("nan")


def machine() -> str:
    """What this ran on, as Markdown."""
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
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, sections: Sequence[Section], how: str) -> None:
    """Put results below the mark of a README, what stands above it stays."""
    above = path.read_text(encoding="utf-8").partition(_MARK)[0] if path.exists() else "# Benchmarks\n\n"
    body = "\n".join(section.markdown() for section in sections)
    text = f"{above.rstrip()}\n\n{_MARK}\n\n## Results\n\n{machine()}\n{how}\n\n{body}"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
