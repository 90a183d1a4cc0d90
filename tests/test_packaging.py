"""What an installation holds, and what ``launch.py`` says where it holds too little."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import yaml

import fourdfy
from fourdfy.config_files import ConfigError, find_config, read_layers
from fourdfy.systems.checkpoint import read_checkpoint
from tests.commands import CONFIGS, ROOT, TINY

OPTIONAL = {"accelerate", "triton", "tomesd", "xformers", "mvdream", "wandb", "ray", "submitit"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
    "lightning_fabric": "pytorch-lightning",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel, built and installed without its dependencies into a folder of its own."""
    made, site = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("site")
    places = ["egg_info", "--egg-base", str(made), "build", "--build-base", str(made)]
    places += ["bdist_wheel", "--bdist-dir", str(made / "bdist"), "--dist-dir", str(made)]
    for command in (
        [sys.executable, "setup.py", "--quiet", *places],
        [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(site), "WHEEL"],
    ):
        wheels = [str(path) for path in made.glob("*.whl")]
        words = [word for item in command for word in (wheels if item == "WHEEL" else [item])]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def run_installed(installed, tmp_path):
    """Run Python in an empty folder, with the wheel's package and the other packages of this environment."""
    elsewhere = tmp_path / "mein Ordner für 4D"
    elsewhere.mkdir()

    def run(*words):
        given = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(installed)}}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import fourdfy; print(fourdfy.__file__)").startswith(str(installed))
    return run


def files(folder, pattern="*"):
    return {path.relative_to(folder) for path in folder.rglob(pattern) if "__pycache__" not in path.parts}


def test_a_wheel_holds_every_config_and_every_file_of_the_package(installed):
    held = files(installed / "fourdfy")
    assert {path for path in files(CONFIGS, "*.yaml")} == {
        path.relative_to("configs") for path in held if path.parts[0] == "configs" and path.suffix == ".yaml"
    }
    package = ROOT / "fourdfy"
    assert {path for path in files(package) if (package / path).is_file()} <= held


PROMPT = ("--prompt", "a red ball spinning")
SMALL = tuple(word for word in TINY if "prompt" not in word)


def test_an_installed_recipe_is_found_by_name_from_any_folder(installed, run_installed):
    program = str(installed / "bin" / "fourdfy")
    assert "stage 3/3" in run_installed(program, "--config", "shapes", "--check", "--gpu", "cpu", *PROMPT)


def test_an_installation_trains_and_evaluates(run_installed, tmp_path):
    """The recipe that ships, in one command."""
    root, results = tmp_path / "out", tmp_path / "out.json"
    command = ["-m", "fourdfy.evaluation.shapes", *PROMPT, "--gpu", "cpu", "--json", str(results)]
    run_installed(*command, *SMALL, "trainer.max_steps=1", f"exp_root_dir={root}")
    (row,) = json.loads(results.read_text())
    assert row["prompt"] == PROMPT[1]
    steps = {path.parts[-4]: read_checkpoint(path)["global_step"] for path in root.rglob("last.ckpt")}
    assert steps == {f"shapes_stage_{n}": 1 for n in (1, 2, 3)}


def test_every_package_that_is_imported_is_declared():
    sources = [ast.parse(path.read_text()) for path in (ROOT / "fourdfy").rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(source)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    imported = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"fourdfy"} - OPTIONAL
    declared = set(re.findall(r'"([\w-]+)[><=]', (ROOT / "setup.py").read_text()))
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in imported} <= {
        name.replace("_", "-") for name in declared & pinned
    }


def test_one_version_is_built_imported_and_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (built,) = re.findall(r'version="([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert str(citation["version"]) == built == fourdfy.__version__


def test_without_the_dependencies_launching_says_what_to_do():
    no_packages = "-S"
    command = [sys.executable, no_packages, "launch.py", "--config", "configs/shapes.yaml", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "source .venv/bin/activate" in done.stderr and "pip install -e ." in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_module_of_our_own_that_is_missing_is_no_matter_of_installing(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'fourdfy.nothing'", name="fourdfy.nothing")

    monkeypatch.setattr("fourdfy.launching.cli.main", broken)
    with pytest.raises(ModuleNotFoundError):
        runpy.run_path(os.fspath(ROOT / "launch.py"), run_name="__main__")


@pytest.mark.parametrize("name", ["shapes", "shapes.yaml", "base/shapes", str(CONFIGS / "shapes")])
def test_a_shipped_config_has_a_name(name):
    assert find_config(name).is_relative_to(CONFIGS)


def test_a_local_file_wins_over_the_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.yaml").write_text("seed: 1\n")
    (tmp_path / "shapes_stage_1").mkdir()
    assert find_config("shapes").resolve() == tmp_path / "shapes.yaml"
    assert find_config("shapes_stage_1") == CONFIGS / "shapes_stage_1.yaml"


def test_a_file_of_ones_own_stands_on_one_that_ships(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: shapes_stage_3\nseed: 1\n")
    below = read_layers(tmp_path / "mine.yaml")[:-1]
    assert below[-1].source == str(CONFIGS / "shapes_stage_3.yaml")


def test_a_name_of_no_config_is_told_the_nearest():
    with pytest.raises(
        ConfigError, match=r"^shape_stage_1: no such config file; did you mean shapes_stage_1 or"
    ):
        read_layers(find_config("shape_stage_1"))
