"""Imports point down: ops know no field, guidances know no renderer, nothing below knows the command line."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fourdfy"
BASE = {
    "types",
    "registry",
    "config",
    "config_files",
    "bounds",
    "schedules",
    "seeds",
    "safe_load",
    "__version__",
}
MAY_IMPORT = {
    "ops": BASE | {"ops"},
    "fields": BASE | {"ops", "fields"},
    "renderers": BASE | {"ops", "fields", "renderers"},
    "diffusion": BASE | {"ops", "diffusion"},
    "prompts": BASE | {"ops", "diffusion", "prompts"},
    "guidance": BASE | {"ops", "diffusion", "prompts", "guidance"},
    "data": BASE | {"ops", "data"},
    "exporters": BASE | {"ops", "fields", "renderers", "callbacks", "exporters"},
    "systems": BASE | {"ops", "fields", "renderers", "prompts", "guidance", "data", "exporters", "systems"},
}
OPTIONAL = {"numba", "triton", "tinycudann", "nerfacc", "xformers", "mvdream"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_only_from_below(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        parts = {name.split(".")[1] for name in imported(path) if name.startswith("fourdfy.")}
        assert parts <= MAY_IMPORT[layer], path


def test_optional_packages_are_imported_in_one_file_each():
    users = {}
    for path in PACKAGE.rglob("*.py"):
        for name in imported(path):
            if name.split(".")[0] in OPTIONAL:
                users.setdefault(name.split(".")[0], set()).add(path.name)
    assert all(len(files) == 1 for files in users.values()), users
