"""The structure of the package: import order, library keys, no cycles, short files and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import rasteret_ml

PACKAGE = Path(__file__).resolve().parents[1] / "rasteret_ml"
ROOMS = (
    "errors", "telemetry", "ranges", "fingerprint", "geo", "cog", "plotting", "storage", "raster", "collection",
    "samplers", "samples", "datasets", "loader", "transforms", "predict", "train", "cli", "testing",
)  # fmt: skip
"""In import order: a file imports only from its own room or from an earlier one."""
KEYS = {
    "aiohttp": {"storage"},
    "aiohappyeyeballs": {"storage"},
    "yarl": {"storage"},
    "imagecodecs": {"cog"},
    "tifffile": set(),  # tests only
    "pyarrow": {"geo", "collection", "raster", "samplers"},
    "torch": {"samplers", "samples", "datasets", "loader", "transforms", "predict", "train"},
    "torchgeo": {"samples", "datasets", "train"},
    "lightning": {"train"},
    "matplotlib": {"plotting"},
    "asyncio": {"storage", "raster", "collection"},
}
"""The rooms that may import a library."""
LAZY_EXCEPTIONS = {("raster/chip.py", "torch")}
FORBIDDEN = {"utils", "core", "common", "helpers", "base", "manager", "types"}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def room(path: Path) -> str:
    """The room that a file is in; a top-level file is its own room."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(tree: ast.Module) -> list[str]:
    """Dotted names of everything that a file imports, lazily too, except for type checking only."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) not in skipped and isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif id(node) not in skipped and isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            names.append(node.module or "")
    return names


def functions() -> Iterator[tuple[str, int, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function: where it is, its lines without the docstring, and its node."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTION):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                yield f"{path.relative_to(PACKAGE)}:{node.name}", length, node


def test_imports_point_down_and_need_a_key() -> None:
    """A file imports from its own room or an earlier one, and a library only where the room has its key."""
    wrong = []
    for path, tree in TREES.items():
        own = room(path)
        if own == "__init__":
            continue
        for name in imports(tree):
            first, _, rest = name.partition(".")
            where = f"{path.relative_to(PACKAGE)} imports {name}"
            if first != "rasteret_ml":
                lazy = (str(path.relative_to(PACKAGE)), first) in LAZY_EXCEPTIONS
                if own not in KEYS.get(first, {own}) and own != "testing" and not lazy:
                    wrong.append(where)
                continue
            other = rest.split(".")[0]
            if other not in ROOMS or (other != own and ROOMS.index(other) > ROOMS.index(own)):
                wrong.append(where)
    assert not wrong


def test_no_import_cycles() -> None:
    """No file reaches itself, lazy imports included."""
    modules = {
        "rasteret_ml." + str(p.relative_to(PACKAGE).with_suffix("")).replace("/", "."): t for p, t in TREES.items()
    }
    graph = {name: {i for i in imports(tree) if i in modules} for name, tree in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_have_a_fair_size_and_their_own_name() -> None:
    """60 to 500 lines (fewer only in `__init__` and `__main__`), and no basename twice."""
    files = [path for path in TREES if path.stem not in ("__init__", "__main__")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert not [path for path in files if not 60 <= lines[path] <= 500]
    assert not [path for path in files if path.stem in FORBIDDEN or path.parent.name in FORBIDDEN]
    assert not [name for name, count in Counter(path.name for path in files).items() if count > 1]


def test_functions_are_short_and_constructors_take_few_arguments() -> None:
    """No function over 60 lines, nine of ten within 25, no constructor with more than 14 arguments."""
    lengths = sorted(length for _, length, _ in functions())
    assert lengths[-1] <= 60
    assert lengths[int(0.9 * len(lengths))] <= 25
    arguments = {where: len(node.args.args) - 1 + len(node.args.kwonlyargs) for where, _, node in functions()}
    assert not [where for where, count in arguments.items() if where.endswith("__init__") and count > 14]


def test_importing_the_package_loads_no_libraries() -> None:
    code = (
        "import sys, rasteret_ml\n"
        "assert not {'torch', 'aiohttp', 'pyarrow', 'geopandas'} & set(sys.modules)\n"
        "assert set(rasteret_ml.__all__) <= set(dir(rasteret_ml))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=PACKAGE.parent)


def test_every_public_name_loads() -> None:
    assert rasteret_ml.__all__ == sorted(rasteret_ml.__all__)
    for name in rasteret_ml.__all__:
        assert getattr(rasteret_ml, name).__name__ == name
