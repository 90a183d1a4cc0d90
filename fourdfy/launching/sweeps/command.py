"""``launch.py --sweep``: run a sweep, list its jobs, or gather its results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fourdfy.config_files import ConfigError
from fourdfy.devices import select_device
from fourdfy.files.atomic import losses_noted
from fourdfy.launching.plan import find_models, memory_needed
from fourdfy.launching.sweeps.jobs import Sweep, read_sweep
from fourdfy.launching.sweeps.results import dropped, write_results
from fourdfy.launching.sweeps.runners import Runner
from fourdfy.launching.sweeps.scheduler import Entry, Scheduler, State, counts, seconds_left
from fourdfy.prompts.base import cache_embeddings
from fourdfy.signals import StopSignals
from fourdfy.terminal import printable

logger = logging.getLogger(__name__)

GATHER_SECONDS = 60.0
"""Between two versions of the results while a sweep runs."""
FRAME = 6
"""Lines of a terminal that the table of running jobs leaves to its title and rules, and to what is logged."""


def sweep(
    file: Path,
    given: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    mode: str | None,
    gpu: str | None,
    stop: StopSignals,
    options: Sequence[str] = (),
) -> int:
    """Run a sweep, or go on with it; gives the exit status, 1 if a job has failed.

    Args:
        given: keys of the sweep file that the command line sets.
        overrides: ``key=value`` for all jobs.
        mode: ``dry-run``, ``gather``, or None to run it.
        gpu: ``cpu``, or None.
        options: of ``launch.py``, for all jobs.

    Raises:
        ConfigError: names the key and the file; or there is nothing to gather.
        WriteError: gathered results can't be written.
        Stopped: a signal ended it; the tasks have saved.
    """
    if gpu not in (None, "cpu"):
        raise ConfigError("--gpu: a sweep uses all visible GPUs (CUDA_VISIBLE_DEVICES), or --gpu cpu")
    made = read_sweep(file, given, overrides, options)
    made.check()
    if mode == "dry-run":
        list_jobs(made)
        return 0
    if mode == "gather":
        gather(made)
        return 0
    stop.advice = lambda: "the same command continues the sweep"
    with losses_noted():
        return run(made, gpu)


def run(made: Sweep, gpu: str | None) -> int:
    jobs, runner = made.jobs, made.cfg.runner.build(gpu)
    made.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(made.folder / ".models.lock"):  # once, before many processes look for them
        find_models([stage for _, _, stages in made.recipes for stage in stages])
        cache_embeddings(made.texts(), select_device(gpu))
    logger.info("%d jobs, %d at a time, in %s", len(jobs), runner.capacity, made.root)
    with Display(made, runner) as display:
        scheduler = Scheduler(made, runner, display.show)
        try:
            scheduler.run()
        finally:
            write_results(made)
    logger.info("%s; %s", counts(scheduler.entries), made.folder / "index.html")
    return int(any(entry.state is State.FAILED for entry in scheduler.entries))


def gather(made: Sweep) -> None:
    """``--gather``: write the results anew."""
    if not any(trial.is_dir() for job in made.jobs for trial in job.trials):
        raise ConfigError(
            f"{made.root} has no trial of this sweep; name the folder that has: exp_root_dir=DIR"
        )
    write_results(made, is_essential=True)
    logger.info("written: %s", made.folder / "index.html")


def list_jobs(made: Sweep) -> None:
    """``--dry-run``: every job, whether it is done, and what it needs, as far as that is known."""
    memory = {
        tuple(words.items()): max(map(memory_needed, stages), key=lambda line: float(line.split()[0]))
        for words, _, stages in made.recipes
    }
    states = {job.tag: "done" if job.has_finished(len(job.trials)) else "to do" for job in made.jobs}
    states |= dict.fromkeys(dropped(made), State.DROPPED)
    table = Table("job", "state", "memory")
    for job in made.jobs:
        cells = (printable(job.name), states[job.tag], memory[tuple(job.settings.items())])
        table.add_row(*map(Text, cells))
    Console().print(table)
    Console().print(*left_to_do(made, states), sep="\n", highlight=False, soft_wrap=True)


def left_to_do(made: Sweep, states: Mapping[str, str]) -> list[str]:
    """How many jobs and steps there are to do, and how long that takes if it is known, in a line each.

    Args:
        states: of each job, by its tag.
    """
    todo, total = [job for job in made.jobs if states[job.tag] == "to do"], len(made.jobs)
    said = f"{len(todo)} of {total} job{'s' * (total != 1)} to do"
    if not todo:
        return [said]
    best, stage = made.kept
    groups = groupby(todo, key=lambda job: (job.prompt, job.settings))
    full = sum(min(len([*seeds]), best) for _, seeds in groups) if stage else len(todo)
    steps = " to ".join(dict.fromkeys(str(pick(sum(job.ends) for job in todo)) for pick in (min, max)))
    if rest := len(todo) - full:
        said += f", {full} of them with all {steps} steps, the others to stage {stage}"
    else:
        said += f", {steps} steps each"

    def seconds(state: str) -> list[float]:
        return [took for job in made.jobs if states[job.tag] == state and (took := made.seconds(job))]

    took, of_first = seconds("done"), seconds(State.DROPPED)
    if not took:
        return [said, "time unknown until a job is done; docs/scaling.md has measured times of steps"]
    hours = (full * fmean(took) + rest * fmean(of_first or took)) / 3600
    about = "at most" if rest and not of_first else "about"
    return [said, f"{about} {hours:.1f} hours of one device, by those that are done"]


class Display:
    """A table of what runs on a terminal, else a line for each change. Now and then it writes the results."""

    def __init__(self, made: Sweep, runner: Runner) -> None:
        self.made, self.runner = made, runner
        self._gathered, self._states = time.monotonic(), dict[str, State]()
        self._live = Live(console=Console(stderr=True), auto_refresh=False) if sys.stderr.isatty() else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
            self._log_above()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
            self._log_above()

    def _log_above(self) -> None:
        """Have what is logged appear above the table, which has put its own stream in place of stderr."""
        for handler in logging.root.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)

    def show(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            before, now = self._states.get(entry.job.tag), entry.state
            if before is not now and self._live is None and not (before is None and now is State.WAITING):
                logger.info("%s: %s (%s)", entry.job.name, now, counts(entries))
            self._states[entry.job.tag] = now
        if self._live:
            left = seconds_left(entries, max(self.runner.capacity, 1))
            self._live.update(table_of(entries, left, self._live.console.size), refresh=True)
        if time.monotonic() - self._gathered > GATHER_SECONDS:
            write_results(self.made)
            self._gathered = time.monotonic()


def table_of(entries: Sequence[Entry], left: float | None, size: ConsoleDimensions) -> Table:
    """What runs, one line each, as many as a terminal of that size has room for.

    Args:
        left: seconds; None if that is not known.
    """
    eta = "" if left is None else f", about {left / 60:.0f} min left"
    title = Text(counts(entries) + eta, no_wrap=True, overflow="ellipsis")
    table = Table(title=title, title_justify="left", expand=True)
    for header, ratio in (("job", 5), ("its log", 6)):  # at 80 columns the second one shows the eta
        table.add_column(header, ratio=ratio, no_wrap=True, overflow="ellipsis")
    running = [entry for entry in entries if entry.state is State.RUNNING]
    room = max(size.height - FRAME, 1)
    shown = running if len(running) <= room else running[: room - 1]
    for entry in shown:
        name = shortened(printable(entry.job.name), (size.width - 3) * 5 // 11 - 2)
        table.add_row(Text(name), Text(printable(last_line(entry.log))))
    if more := len(running) - len(shown):
        table.add_row(f"and {more} more", "")
    return table


def shortened(text: str, cells: int) -> str:
    """As much as so many cells of a terminal hold: its beginning and, of a job, the end that has the seed."""
    if cell_len(text) <= cells:
        return text
    half = (cells - 1) // 2
    return set_cell_size(text, cells - 1 - half) + "…" + set_cell_size(text[::-1], half)[::-1]


def last_line(log: Path) -> str:
    """What a task said last; "" if nothing."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 1000))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
