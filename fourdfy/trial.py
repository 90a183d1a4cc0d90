"""The trial folder: what a run was made from, beside what it makes."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fourdfy.config_files import save_yaml
from fourdfy.experiment import Experiment

PACKAGE = Path(__file__).parent


def prepare_trial(experiment: Experiment, files: Sequence[Path], command: Sequence[str]) -> None:
    """Create the folder; write the configs, the command line and a snapshot of the code."""
    trial = experiment.trial_dir
    for name in ("ckpts", "configs", "save", "code"):
        (trial / name).mkdir(parents=True, exist_ok=True)
    save_yaml(experiment.values, trial / "configs" / "parsed.yaml")
    raw = "".join(f"# {file.name}\n{file.read_text()}\n" for file in files)
    (trial / "configs" / "raw.yaml").write_text(raw)
    with open(trial / "cmd.txt", "a") as file:  # a resumed trial has several
        file.write(shlex.join(command) + "\n")
    _snapshot_code(trial / "code")


def _snapshot_code(target: Path) -> None:
    """The files git lists, or the installed package's sources where there is no checkout."""
    root = PACKAGE.parent
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", "*.py", "*.yaml", "requirements.txt"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else []
    sources = [root / name for name in names] or sorted(PACKAGE.rglob("*.py"))
    for source in sources:
        if source.is_file():
            destination = target / source.relative_to(root)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, destination)
