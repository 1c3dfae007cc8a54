"""The rooms import one way only (CONTRIBUTING.md, "The map")."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room -> folder, from the top down. A room may import itself and the rooms below it.
LAYERS: list[list[str]] = [
    ["serving.launch"],
    ["serving.api", "serving.sim"],
    ["serving.incident"],
    ["serving.cluster"],
    ["serving.elastic", "serving.engine"],
    ["serving.kv"],
    ["lumen"],
    ["lumen_kernels"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# `policy` decides on snapshots and imports nothing of the others; all may import it.
# `serving.errors` and `serving.results_file` stand beside the rooms: the one builds on lumen.errors
# alone, the other on nothing.
FREE = ("serving.policy", "serving.errors", "serving.results_file")


def room_of(module: str) -> str | None:
    """The room a dotted module name belongs to; None if it is not ours."""
    for room in (*LEVEL, *FREE):
        if module == room or module.startswith(room + "."):
            return room
    return None


def imported_modules(source: str) -> Iterator[str]:
    """Absolute names of everything imported, inside functions too.

    `from a import b` yields both `a` and `a.b`: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room they reach into"
            assert node.module is not None
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def violations(module: str, source: str) -> list[str]:
    """Imports of `source` that point up or sideways."""
    here = room_of(module)
    assert here is not None, f"{module} belongs to no room; add it to LAYERS"
    wrong = []
    for name in imported_modules(source):
        there = room_of(name)
        if there is None or there == here:
            continue
        if here == "serving.errors":
            allowed = name.startswith("lumen.errors")
        elif here in FREE:
            allowed = False
        else:
            allowed = there in FREE or LEVEL[there] > LEVEL[here]
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


def our_files() -> list[tuple[str, Path]]:
    """Every module of the three packages with its dotted name, package roots left out."""
    found = []
    for base, folder in ((ROOT, "lumen"), (ROOT, "serving"), (ROOT / "kernels", "lumen_kernels")):
        for path in sorted((base / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if module != "serving":
                found.append((module, path))
    return found


@pytest.mark.parametrize(("module", "path"), our_files(), ids=lambda value: str(value))
def test_imports_point_one_way(module: str, path: Path) -> None:
    assert violations(module, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lumen.model", "import serving.engine.plan"),
        ("lumen_kernels.paged_attention", "from lumen import config"),
        ("serving.engine.core", "from serving.cluster.messages import LoadReport"),
        ("serving.policy.dispatch", "from serving.engine.request import Priority"),
        ("serving.api.http", "def f():\n    import serving.launch"),
        ("serving.sim.heap", "from serving import api"),
        ("serving.cluster.worker_shell", "from serving.incident.recorder import Recorder"),
        ("serving.errors", "import lumen.config"),
        ("serving.results_file", "import lumen.errors"),
    ],
)
def test_the_check_sees_a_wrong_import(module: str, source: str) -> None:
    assert violations(module, source) != []
