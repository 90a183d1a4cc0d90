"""What holds on every platform. These look at the sources; nothing is run on another system."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "fourdfy").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "launch.py"])
POSIX_ONLY = {"resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "syslog"}


def opens_text(call: ast.Call) -> bool:
    """``open(...)`` and ``path.open("w")`` without a "b" in their mode, ``read_text`` and ``write_text``."""
    is_name = isinstance(call.func, ast.Name)
    name = call.func.id if is_name else getattr(call.func, "attr", "")
    arguments = [*call.args[is_name:], *(keyword.value for keyword in call.keywords)]
    modes = [
        node.value for node in arguments if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    if name == "open":
        return not any("b" in mode for mode in modes) and bool(is_name or modes)
    return name in ("read_text", "write_text")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_text_file_is_opened_as_utf_8(path):
    calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
    for call in filter(opens_text, calls):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("encoding") in ("'utf-8'", "'utf-8-sig'"), (
            f"{path}:{call.lineno}: {ast.unparse(call)}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_module_needs_posix_to_be_imported(path):
    for node in ast.parse(path.read_bytes()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not POSIX_ONLY & set(names), f"{path}:{node.lineno}: import it where it is used"
