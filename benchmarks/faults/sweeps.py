"""A sweep that is killed again and again, its jobs too; afterwards all are done, and equal to serial runs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from faults.runs import Undisturbed, differences, results, start
from faults.table import Row
from fourdfy.launching.sweeps.jobs import Job, Sweep, read_sweep
from fourdfy.pages.trials import sessions
from tests.commands import ROOT, TINY

STEPS, EVERY = 6, 2
PROMPTS, SEEDS = ("a red cube spinning", "a blue ball bouncing"), (0, 1)
SETTINGS = {"plain": [], "sparse": ["system.loss.lambda_sparsity=3"]}
GIVEN = [word for word in TINY if not word.startswith(("use_timestamp", "tag", "system.prompt_processor"))]
OVERRIDES = [*GIVEN, f"trainer.max_steps={STEPS}", f"checkpoint.every_n_train_steps={EVERY}"]
LOCAL, RAY = "{type: local, per_gpu: 2}", "{type: ray}"
KILL_SECONDS = 2.0, 25.0
"""After the start of the sweep; a job needs ten seconds of a free core to start."""


def sweeps(count: int, seed: int, folder: Path, reference: Undisturbed, runner: str = LOCAL) -> Iterator[Row]:
    """A sweep of eight jobs on two processes, killed so many times by SIGKILL, or one of its processes
    instead; one of its jobs can't succeed. The row counts what was killed, and at last the jobs."""
    sweep, alone = (_sweep(folder / name, reference.config, runner) for name in ("killed", "alone"))
    hopeless = sweep.jobs[3]
    hopeless.trials[0].parent.mkdir(parents=True)
    hopeless.trials[0].write_text("a file in the place of its folder")
    draws = random.Random(seed)
    on = "" if runner == LOCAL else ", on Ray"
    kills = Row(f"a sweep or one of its processes killed{on}")
    ends = Row(f"jobs of a sweep after its kills{on}")
    for _ in range(count):
        _run(sweep, folder, draws.uniform(*KILL_SECONDS), draws.choice(["sweep", "sweep", "process"]), kills)
        yield from (kills, ends)
    if (status := _run(sweep, folder)) != 1:  # one has failed
        ends.add("", [f"exit status {status}: {(folder / 'said.txt').read_text(encoding='utf-8')}"])
    for job, single in zip(sweep.jobs, alone.jobs, strict=True):
        if job is hopeless:
            ends.add("failed, as it had to", _wrong(not job.has_finished(1), "has finished", job))
            continue
        child = start(list(single.arguments), folder / "alone.txt")
        assert child.wait() == 0, child.said()
        pairs = zip(job.trials, single.trials, strict=True)
        found = [d for trial, other in pairs for d in differences(results(trial), results(other))]
        ends.add("equal to a run of its own", [f"{job.name}: {found}"] if found else None)
        twice = [trial.name for trial in job.trials if _steps_again(trial)]
        ends.add("computed no step twice that was saved", [f"{job.name}: {twice}"] if twice else None)
    yield from (kills, ends)


def _sweep(root: Path, config: str, runner: str) -> Sweep:
    file = root.with_suffix(".yaml")
    lines = [
        f"config: {config}",
        f"prompts: {list(PROMPTS)}",
        f"seeds: {list(SEEDS)}",
        f"settings: {SETTINGS}",
    ]
    lines += [f"exp_root_dir: {root}", f"runner: {runner}", "retries: 1"]
    file.write_text("\n".join(lines), encoding="utf-8")
    return read_sweep(file, {}, OVERRIDES)


def _run(sweep: Sweep, folder: Path, seconds: float = 0.0, whom: str = "", kills: Row | None = None) -> int:
    """Run it, and kill it or a process of it after some seconds; gives the exit status."""
    command = [sys.executable, str(ROOT / "launch.py"), "--sweep", str(sweep.root.with_suffix(".yaml"))]
    with open(folder / "said.txt", "w", encoding="utf-8") as said:
        process = subprocess.Popen([*command, "--gpu", "cpu", *OVERRIDES], stderr=said, stdout=said)
    if kills is None:
        return process.wait()
    time.sleep(seconds)
    if whom == "process":
        while not (tasks := _tasks(sweep)) and process.poll() is None:
            time.sleep(0.1)
        for pid in tasks[:1]:
            os.kill(pid, signal.SIGKILL)
        kills.add("process" if tasks else "had come to its end")
        time.sleep(seconds)
    process.kill()
    if whom == "sweep":
        kills.add("sweep" if process.wait() == -signal.SIGKILL else "had come to its end")
    return process.wait()


def _tasks(sweep: Sweep) -> list[int]:
    """The processes of its jobs, whoever started them."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "fourdfy.launching.cli" in words and f"exp_root_dir={sweep.root}" in words:
                found.append(int(place.name))
    return sorted(found)


def _steps_again(trial: Path) -> bool:
    """Whether a session began before the end of one that had ended by itself, and so had saved."""
    return any(later.first < earlier.last for earlier, later in pairwise(sessions(trial)))


def _wrong(is_right: bool, what: str, job: Job) -> list[str] | None:
    return None if is_right else [f"{job.name}: {what}"]
