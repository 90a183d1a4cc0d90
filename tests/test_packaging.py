"""What an installation holds, and what ``launch.py`` says where it holds too little."""

import os
import runpy
import subprocess
import sys

import pytest

from tests.launching import CONFIGS, ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as a wheel holds it, alone in a folder."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


def files(folder, pattern="*"):
    return {path.relative_to(folder) for path in folder.rglob(pattern) if "__pycache__" not in path.parts}


def test_a_wheel_holds_every_config_and_every_file_of_the_package(installed):
    held = files(installed / "fourdfy")
    assert {path for path in files(CONFIGS, "*.yaml")} == {
        path.relative_to("configs") for path in held if path.parts[0] == "configs" and path.suffix == ".yaml"
    }
    package = ROOT / "fourdfy"
    assert {path for path in files(package) if (package / path).is_file()} <= held


def test_without_the_dependencies_launching_says_what_to_do():
    command = [
        sys.executable,
        "-S",
        "launch.py",
        "--config",
        "configs/shapes.yaml",
        "--check",
    ]  # -S: no packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "source .venv/bin/activate" in done.stderr and "pip install -e ." in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_module_of_our_own_that_is_missing_is_no_matter_of_installing(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'fourdfy.nothing'", name="fourdfy.nothing")

    monkeypatch.setattr("fourdfy.cli.main", broken)
    with pytest.raises(ModuleNotFoundError):
        runpy.run_path(os.fspath(ROOT / "launch.py"), run_name="__main__")
