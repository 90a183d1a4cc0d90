"""Imports point down, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fourdfy"
COMMON = {path.stem for path in PACKAGE.glob("*.py")} | {"__version__"}
MAY_IMPORT = {
    "files": set(),
    "ops": set(),
    "scenes": {"ops"},
    "priors": {"ops", "files"},
    "prompts": {"priors", "files"},
    "guidance": {"ops", "priors", "prompts"},
    "data": {"ops"},
    "exporters": {"ops", "files", "scenes"},
    "original": {"files"},
    "pages": {"files"},
    "study": {"files", "pages", "prompts"},
    "systems": {"ops", "files", "scenes", "priors", "prompts", "guidance", "data", "exporters", "original"},
    "shapes": {"ops"},
    "callbacks": {"ops", "files", "data", "systems"},
    "viewing": {"ops", "files", "data", "guidance", "systems", "callbacks"},
    "evaluation": {"ops", "files", "priors", "systems", "shapes", "callbacks"},
    "launching": {
        "files",
        "ops",
        "priors",
        "prompts",
        "data",
        "systems",
        "callbacks",
        "original",
        "shapes",
        "evaluation",
        "pages",
        "study",
        "viewing",
    },
}
"""Rooms of the package -> the rooms that each may import from, besides itself and the common language."""
OPTIONAL = {"numba", "triton", "tinycudann", "nerfacc", "xformers", "mvdream", "viser"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def modules() -> dict[str, Path]:
    return {
        ".".join(("fourdfy", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def test_every_room_has_its_floor():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_below(room):
    for path in (PACKAGE / room).rglob("*.py"):
        parts = {name.split(".")[1] for name in imported(path) if name.startswith("fourdfy.")}
        assert parts - COMMON <= MAY_IMPORT[room] | {room}, path


def test_the_common_language_knows_no_room():
    for path in PACKAGE.glob("*.py"):
        parts = {name.split(".")[1] for name in imported(path) if name.startswith("fourdfy.")}
        assert parts <= COMMON, path


def test_no_modules_import_each_other():
    """Imports inside of functions count: a circle that is broken there is one."""
    known = modules()
    graph = {name: imported(path) & known.keys() for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_optional_packages_are_imported_in_one_file_each():
    users = {}
    for path in PACKAGE.rglob("*.py"):
        for name in imported(path):
            if name.split(".")[0] in OPTIONAL:
                users.setdefault(name.split(".")[0], set()).add(path.name)
    assert all(len(files) == 1 for files in users.values()), users
