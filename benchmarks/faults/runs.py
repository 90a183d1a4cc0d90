"""Small runs of ``launch.py`` that can be killed at a chosen moment.

They are forks of a process that has imported everything and never computes anything, so that nothing is
imported again.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fourdfy.callbacks.renders import SaveRenders
from fourdfy.config_files import CONFIGS
from fourdfy.files.safe_load import read_torch_file
from fourdfy.launching import cli, closing, lightning, train
from fourdfy.launching import run as launch_run
from fourdfy.launching.lightning import LightningSystem
from tests.commands import TINY

EVERY_N_STEPS = 2
SETTINGS = (
    *TINY,
    "system.prompt_processor.prompt=a zebra dancing",  # not of the shapes world, so it has no scores
    f"checkpoint.every_n_train_steps={EVERY_N_STEPS}",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
)
FUNCTIONS: dict[str, tuple[tuple[Any, str], ...]] = {
    "start-up": ((launch_run, "load_recipe"), (launch_run, "check_run")),
    "hand-over": ((train, "_train_stage"),),
    "training": ((LightningSystem, "training_step"),),
    "checkpoint": ((lightning, "write_checkpoint"),),
    "validation": ((LightningSystem, "validation_step"),),
    "pictures": ((SaveRenders, "after_validation"), (SaveRenders, "after_test")),
    "tests": ((lightning.Trainer, "test"),),
    "closing": ((closing, "log_closing"),),
}
"""Phases of a run -> the functions with which each begins."""
HANG_SECONDS = 300.0


@dataclass
class Child:
    """A run in a process of its own, and the phases that it has begun."""

    pid: int
    pipe: int
    log: Path
    began: list[tuple[str, float]] = field(default_factory=list)
    """Phases, and when they began, in seconds of the monotonic clock."""
    steps: list[tuple[str, int]] = field(default_factory=list)
    """The stage and the global step of every training step that began."""
    _rest: bytes = b""

    def phases(self) -> Iterator[str]:
        """Every phase as it begins, until the run ends."""
        until = time.monotonic() + HANG_SECONDS
        while select.select([self.pipe], [], [], max(until - time.monotonic(), 0))[0]:
            if not (read := os.read(self.pipe, 65536)):
                self.began.append(("end", time.monotonic()))
                return
            *lines, self._rest = (self._rest + read).split(b"\n")
            said = [line.decode().split("\t") for line in lines]
            # All at once: who waits for one phase does not come back for the others of the same read.
            self.began += [(phase, time.monotonic()) for phase, *_ in said]
            self.steps += [(step[0], int(step[1])) for _, *step in said if step]
            yield from (phase for phase, *_ in said)
        raise TimeoutError(f"the run hangs; {self.log}")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status; negative for a signal that killed it."""
        try:
            for _ in self.phases():
                pass
        except TimeoutError:
            self.send(signal.SIGKILL)
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def seconds(self) -> dict[str, list[float]]:
        """Phases -> how long each took."""
        took: dict[str, list[float]] = {}
        for (phase, began), (_, ended) in pairwise(self.began):
            took.setdefault(phase, []).append(ended - began)
        return took

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> Child:
    """Run ``launch.py`` with arguments in a fork; ``prepare`` is called in it first."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return Child(pid, read, log)
    status = 1
    try:
        os.close(read)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        _announce(write)
        prepare()
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        os._exit(status)


def _announce(pipe: int) -> None:
    """Have every phase that begins written to a pipe."""

    def patch(owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def announced(*args: Any, **keywords: Any) -> Any:
            line = phase
            if phase == "training":
                line += f"\t{args[0].run.folder.parent.name}\t{args[0].global_step}"
            os.write(pipe, f"{line}\n".encode())
            return original(*args, **keywords)

        setattr(owner, name, announced)

    for phase, functions in FUNCTIONS.items():
        for owner, name in functions:
            patch(owner, name, phase)


@dataclass
class Undisturbed:
    """A run that nothing happens to, and what it leaves."""

    root: Path
    config: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Phases -> how long each has taken, lately."""
    stages: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def command(self, root: Path) -> list[str]:
        """The arguments of the same run in another folder."""
        file = str(CONFIGS / f"{self.config}.yaml")
        return ["--config", file, "--train", "--gpu", "cpu", f"exp_root_dir={root}", *SETTINGS]


def undisturbed(folder: Path, config: str) -> Undisturbed:
    """Do one; this also imports into this process what runs need."""
    run = Undisturbed(folder / "reference", config)
    names = folder / "modules.txt"

    def list_imports() -> None:
        cli.main(run.command(run.root))
        names.write_text("\n".join(sys.modules), encoding="utf-8")
        os._exit(0)

    child = start([], folder / "log.txt", list_imports)
    assert child.wait() == 0, child.said()
    for name in names.read_text(encoding="utf-8").split():
        if name not in sys.modules:
            importlib.import_module(name)
    run.seconds, run.stages = child.seconds(), [*dict(child.steps)]
    run.results = results(run.root)
    return run


def results(root: Path) -> dict[str, Any]:
    """All that a finished run is judged by: its checkpoints' content and its pictures' bytes, by path."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.name == "last.ckpt":
            content = read_torch_file(path)
            found[name] = {key: content[key] for key in ("state_dict", "optimizer_states", "global_step")}
        elif path.suffix in (".png", ".mp4"):
            found[name] = path.read_bytes()
    return found


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """The places where two results are not equal, bit for bit."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        missing = [f"{where}/{key}" for key in found.keys() ^ expected.keys()]
        both = found.keys() & expected.keys()
        return missing + [d for key in both for d in differences(found[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [d for index, pair in pairs for d in differences(*pair, f"{where}/{index}")]
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        return [] if torch.equal(found, expected) else [where]
    return [] if found == expected else [where]
