"""The house keeps its rules: steps, keys, no cycles, short files, tidy doors. Pure AST, lazy imports counted."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rasteret_ml"
STEPS = {
    "errors": 0, "instants": 1, "plans": 1, "ranges": 1, "telemetry": 1, "geo": 2, "cog": 3, "plotting": 3,
    "record": 4, "fetch": 5, "raster": 6, "runtime": 7, "collection": 8, "ingest": 9, "aois": 10, "sampling": 11,
    "splitting": 12, "scenes": 13, "samples": 14, "reading": 15, "datasets": 16, "painting": 17, "loading": 18,
    "maps": 19, "statistics": 20, "preparing": 20, "train": 21, "cli": 22, "testing": 22,
}  # fmt: skip
KEYS = {
    "aiohttp": {"fetch"},
    "aiohappyeyeballs": {"fetch"},
    "yarl": {"fetch"},
    "imagecodecs": {"cog"},
    "tifffile": {"cog"},
    "pyarrow": {"geo", "collection", "ingest", "raster"},
    "torch": {
        "sampling", "samples", "reading", "datasets", "painting", "loading", "maps", "statistics", "preparing", "train",
    },
    "torchgeo": {"samples", "datasets", "painting", "train"},
    "lightning": {"train"},
    "matplotlib": {"plotting"},
    "asyncio": {"fetch", "raster", "runtime", "collection", "ingest"},
}  # fmt: skip
LAZY_EXCEPTIONS = {("raster/chip.py", "torch")}
FORBIDDEN = {"utils", "core", "common", "helpers", "base", "manager", "types"}
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def room(path: Path) -> str:
    """The room that a file is in (a top-level file is its own)."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, anywhere in it, but for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(id(inner) for statement in node.body for inner in ast.walk(statement))
    names = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_imports_only_from_lower_steps_or_its_own_room(path: Path) -> None:
    """The staircase is climbed one way."""
    own = room(path)
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "rasteret_ml" or len(parts) == 1:
            assert name != "rasteret_ml", f"{path.name} imports through the door"
            continue
        other = parts[1]
        assert other == own or STEPS[other] < STEPS[own], f"step {STEPS[own]} ({own}) imports {name}"
        assert other != "testing" or own == "testing"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_library_is_used_only_in_the_rooms_that_have_its_key(path: Path) -> None:
    """Sockets in fetch, torch in loading and train, and so on."""
    own = room(path)
    if own == "testing":
        return
    for name in imports(path):
        library = name.split(".")[0]
        lazy = (str(path.relative_to(PACKAGE)), library) in LAZY_EXCEPTIONS
        assert lazy or own in KEYS.get(library, {own}), f"{own} has no key for {library}"


def test_no_import_cycles() -> None:
    """No file reaches itself, lazy imports included."""
    modules = {"rasteret_ml." + str(p.relative_to(PACKAGE).with_suffix("")).replace("/", "."): p for p in FILES}
    graph = {name: {i for i in imports(path) if i in modules} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_short_and_well_named(path: Path) -> None:
    """No file over 400 lines, no function over 60 lines of code, no room for leftovers."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert path.stem not in FORBIDDEN
    assert path.parent.name not in FORBIDDEN
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= 60, f"{node.name}: {length} lines"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.stem != "__main__"], ids=[n for n in NAMES if "__main__" not in n]
)
def test_all_is_sorted_and_true(path: Path) -> None:
    """`__all__` is sorted, names what the file defines, and every public definition is in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed = None
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            defined.add(node.targets[0].id)
            if node.targets[0].id == "__all__" and isinstance(node.value, ast.List):
                listed = [ast.literal_eval(item) for item in node.value.elts]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            defined.update(alias.asname or alias.name for alias in node.names)
    if path.name == "__init__.py":
        return
    assert listed is not None, "no __all__"
    assert listed == sorted(listed)
    assert set(listed) <= defined
    classes_and_functions = {
        node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    assert {name for name in classes_and_functions if not name.startswith("_")} <= set(listed)


def test_every_room_has_a_step_and_says_it_first() -> None:
    """A room's docstring begins with its step."""
    for path in PACKAGE.iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            doc = ast.get_docstring(ast.parse((path / "__init__.py").read_text(encoding="utf-8"))) or ""
            assert doc.startswith(f"Step {STEPS[path.name]}."), path.name


def test_the_door_is_lazy_sorted_and_opens() -> None:
    """Importing the package loads neither torch nor aiohttp, and every name at the door is there."""
    code = (
        "import sys, rasteret_ml\n"
        "assert not {'torch', 'aiohttp', 'pyarrow', 'geopandas'} & set(sys.modules)\n"
        "assert list(rasteret_ml.__all__) == sorted(rasteret_ml.__all__)\n"
        "assert set(rasteret_ml.__all__) <= set(dir(rasteret_ml))\n"
        "[getattr(rasteret_ml, name) for name in rasteret_ml.__all__]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=PACKAGE.parent)


def test_functions_are_mostly_small() -> None:
    """Nine of ten functions have at most 30 lines of code."""
    lengths = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lengths.append(body[-1].end_lineno - body[0].lineno + 1 if body else 0)  # type: ignore[operator]
    lengths.sort()
    assert lengths[int(0.9 * len(lengths))] <= 30
