"""Starters of the same trial at the same instant: one of them owns it, whatever becomes of the others."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from faults.runs import Undisturbed
from faults.table import Row
from fourdfy.config_files import ConfigError
from fourdfy.launching.trial import owned

STARTERS = 6


def races(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """Each race has ``STARTERS`` processes. An owner trains, fails at once, which removes the folder under
    the feet of the others, or is killed; every folder must be free in the end."""
    row = Row(f"{STARTERS} starters of a trial at once; owners that go on, fail at once or are killed")
    for number in range(count):
        draws = random.Random(f"{seed}/{number}")
        trial = folder / f"race_{number}" / "trial"
        said = _race(draws, trial)
        owners = sum("+" in line for line in said)
        with owned(trial):  # raises if a lock was left behind
            pass
        together = any("+" in first and "+" in then for first, then in pairwise(said))
        wrong = [f"race {number} of seed {seed}: {said}"] if together or not owners else []
        row.add("one owner at a time" if owners > 1 else "one owner", wrong)
    yield row


def _race(draws: random.Random, trial: Path) -> list[str]:
    """``+`` as a process begins to own the trial and ``-`` before it ends, in order."""
    log = trial.parent.with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    events = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    instant = time.monotonic() + 0.05
    plans = [
        (draws.choice(["go on", "fail", "be killed"]), draws.uniform(0.0, 0.03)) for _ in range(STARTERS)
    ]
    processes = []
    for plan in plans:
        if not (pid := os.fork()):
            try:
                with suppress(ConfigError):
                    _own(trial, events, instant, *plan)
            finally:
                os._exit(0)
        processes.append(pid)
    for pid in processes:
        os.waitpid(pid, 0)
    os.close(events)
    return log.read_text(encoding="utf-8").split("\n")[:-1]


def _own(trial: Path, events: int, instant: float, plan: str, seconds: float) -> None:
    while time.monotonic() < instant:
        pass
    with owned(trial):
        os.write(events, f"+ {os.getpid()} {plan}\n".encode())
        if plan == "go on":
            (trial / "result").touch()
        time.sleep(seconds)
        os.write(events, f"- {os.getpid()}\n".encode())
        if plan == "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
