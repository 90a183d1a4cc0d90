"""Runs that are killed again and again, at random moments of a random phase, until one comes to its end."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from faults.runs import EVERY_N_STEPS, Child, Undisturbed, differences, results, start
from faults.table import Row
from fourdfy.files.safe_load import read_torch_file
from tests.commands import trial

TWICE = "SIGINT twice"
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGTERM", "SIGINT", TWICE, "SIGHUP", "SIGUSR1", "SIGXCPU")
"""As often as they are drawn."""
POLITE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU")
PHASES = {
    "start-up": 3,
    "hand-over": 3,
    "training": 4,
    "checkpoint": 5,
    "validation": 3,
    "pictures": 4,
    "tests": 2,
    "closing": 1,
}
"""How often each is drawn. Nearly all of a run comes before its last phases, so these are rare."""
SKIP = 0.25
"""The probability that a kill waits until its phase begins another time."""
SOON_SECONDS = 3.0


def kills(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """``count`` kills, in as many campaigns as it takes; each ends with a run that finishes.

    All rows are given again after each.
    """
    rows = {phase: Row(f"killed in {phase}") for phase in PHASES}
    ends = Row("runs that went on after all of their kills")
    number = 0
    while sum(row.times for row in rows.values()) < count:
        draws, root = random.Random(f"{seed}/{number}"), folder / f"campaign_{number}"
        _Campaign(draws, root, reference, rows, count).run(ends)
        number += 1
        yield from (*rows.values(), ends)


class _Campaign:
    """A run in ``root`` that is killed until it has nothing left to do."""

    def __init__(
        self, draws: random.Random, root: Path, reference: Undisturbed, rows: dict[str, Row], count: int
    ) -> None:
        self.draws, self.root, self.reference, self.rows, self.count = draws, root, reference, rows, count
        self.history: list[str] = []
        self.begun: dict[str, int] = {}
        """Stage -> the last step that was begun in it."""
        self.may_repeat = 0
        """Steps that kills may have cost since the last step that was computed."""

    def run(self, ends: Row) -> None:
        self.root.mkdir(parents=True)
        while True:
            (phase,) = self.draws.choices([*PHASES], [*PHASES.values()])
            name = self.draws.choice(SIGNALS)
            if sum(row.times for row in self.rows.values()) >= self.count:
                phase = "none"
            child = start(self.reference.command(self.root), self.root / "log.txt")
            if not self._kill(child, phase, name):
                break
            self.history.append(f"{name} in {phase}")
            sent, status = time.monotonic(), child.wait()
            outcome, wrong = ending(child.said(), name, status)
            if outcome == "stopped" and time.monotonic() - sent > SOON_SECONDS:
                outcome += f", after more than {SOON_SECONDS:g} s"
            wrong += [*self._repeated(child), *torn(self.root)]
            self.rows[phase].add(f"{name}: {outcome}", self._told(wrong))
            if name in ("SIGKILL", TWICE):
                self.may_repeat = EVERY_N_STEPS
            elif child.steps:
                self.may_repeat = 0
        status = child.wait()
        self.reference.seconds |= child.seconds()
        wrong = [] if status == 0 else [f"status {status}: {child.said()[-3000:]}"]
        wrong += [*self._repeated(child), *differences(results(self.root), self.reference.results)]
        ends.add("came to the same scenes and pictures", self._told(wrong))
        if not wrong:
            shutil.rmtree(self.root)

    def _kill(self, child: Child, phase: str, name: str) -> bool:
        """Kill the run at a random moment of a phase; False if that did not come any more."""
        for begun in child.phases():
            if begun == phase and self.draws.random() > SKIP:
                time.sleep(self.draws.random() * self.draws.choice(self.reference.seconds[phase]))
                child.send(getattr(signal, name.removesuffix(" twice")))
                if name == TWICE:
                    time.sleep(self.draws.uniform(0.12, 0.5))
                    child.send(signal.SIGINT)
                return True
        return False

    def _repeated(self, child: Child) -> list[str]:
        """The steps of a run that should have been saved, or come later."""
        wrong = []
        for stage, step in child.steps:
            expected = self.begun.get(stage, -1) + 1
            if not expected - self.may_repeat <= step <= expected:
                wrong.append(f"{stage} goes on at step {step} instead of {expected}")
            self.begun[stage] = step
        return wrong

    def _told(self, wrong: list[str]) -> list[str]:
        return [f"{self.root.name}, {'; '.join(self.history)}: {entry}" for entry in wrong]


def ending(said: str, name: str, status: int, finished: str = "done in ") -> tuple[str, list[str]]:
    """How a process ended at a signal, and what should have been otherwise.

    Args:
        finished: what it says when it has come to its end.
    """
    number = getattr(signal, name.removesuffix(" twice"))
    if "Traceback" not in said:
        if status == 0 and finished in said:
            return "had come to its end", []
        if status == -number == -signal.SIGKILL:
            return "killed", []
        if status == 128 + number and "quit at once; " in said:
            return "quit at once", []
        if status == 128 + number and f"stopped by {signal.Signals(number).name}; " in said:
            return "stopped", []
    return "", [f"{name}, status {status}: {said[-3000:]}"]


def torn(root: Path) -> list[str]:
    """The checkpoints under their final names that can't be read."""
    wrong = []
    for path in root.rglob("[!.]*.ckpt"):
        try:
            read_torch_file(path)
        except Exception as error:
            wrong.append(f"{path}: {error}")
    return wrong


def starts(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """Kills of true ``python launch.py`` processes while they import and build."""
    row = Row("python launch.py killed in its first seconds")
    draws, root = random.Random(seed), folder / "starts"
    root.mkdir()
    launch = Path(__file__).parents[2] / "launch.py"
    line = [sys.executable, str(launch), *reference.command(root)]
    took = 4.0
    for number in range(count):
        name, delay = draws.choice(("SIGKILL", *POLITE)), draws.uniform(0.0, took)
        with open(root / "log.txt", "w", encoding="utf-8") as log:
            process = subprocess.Popen(line, stdout=log, stderr=log)
            time.sleep(delay)
            process.send_signal(getattr(signal, name))
            status = process.wait()
        said = (root / "log.txt").read_text(encoding="utf-8")
        outcome, wrong = ending(said, name, status)
        if (status == -getattr(signal, name) and not said) or "init_import_site" in said:
            outcome, wrong = "ended before Python had read a line of it", []
        told = f"start {number} after {delay:.2f} s"
        row.add(f"{name}: {outcome}", [f"{told}: {entry}" for entry in [*wrong, *torn(root)]])
    yield row
    shutil.rmtree(root)


def other_modes(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """Kills of ``--test``, ``--validate`` and ``--export`` of a finished trial, each then repeated."""
    root = folder / "modes"
    shutil.copytree(reference.root, root)
    here = trial(root, reference.stages[-1])
    for mode in ("test", "validate", "export"):
        row = Row(f"--{mode} killed")
        line = ["--trial", str(here), f"--{mode}", "--gpu", "cpu"]
        log = root / "log.txt"
        began = time.monotonic()
        assert start(line, log).wait() == 0, log.read_text(encoding="utf-8")
        seconds = time.monotonic() - began
        expected = results(root)
        for number in range(count // 3):
            draws = random.Random(f"{seed}/{mode}/{number}")
            name, delay = draws.choice(SIGNALS), draws.uniform(0.0, seconds)
            child = start(line, log)
            time.sleep(delay)
            child.send(getattr(signal, name.removesuffix(" twice")))
            status = child.wait()
            outcome, wrong = ending(child.said(), name.removesuffix(" twice"), status, finished=str(here))
            if status == -getattr(signal, name.removesuffix(" twice")) and delay < 0.1:
                outcome, wrong = "ended before it began", []
            again = start(line, log).wait() if number % 3 == 0 else 0
            wrong += differences(results(root), expected) if number % 3 == 0 else torn(root)
            wrong += [] if again == 0 else [f"again: status {again}"]
            row.add(outcome, [f"number {number} after {delay:.2f} s: {entry}" for entry in wrong])
        yield row
    shutil.rmtree(root)
