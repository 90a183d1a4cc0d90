"""``launch.py --sweep``: run a sweep, list its jobs, or gather its results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fourdfy.config_files import ConfigError
from fourdfy.devices import select_device
from fourdfy.files.atomic import losses_noted
from fourdfy.launching.plan import find_models, memory_needed
from fourdfy.launching.sweeps.jobs import Sweep, read_sweep
from fourdfy.launching.sweeps.results import dropped, write_results
from fourdfy.launching.sweeps.scheduler import Entry, Scheduler, State, counts, seconds_left
from fourdfy.prompts.base import cache_embeddings
from fourdfy.signals import StopSignals
from fourdfy.terminal import printable

logger = logging.getLogger(__name__)

GATHER_SECONDS = 60.0
"""Between two versions of the results while a sweep runs."""


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
        ConfigError: names the key and the file.
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
        return gather(made)
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
    with Display(made, runner.capacity) as display:
        scheduler = Scheduler(made, runner, display.show)
        try:
            scheduler.run()
        finally:
            write_results(made)
    logger.info("%s; %s", counts(scheduler.entries), made.folder / "index.html")
    return int(any(entry.state is State.FAILED for entry in scheduler.entries))


def gather(made: Sweep) -> int:
    """``--gather``: write the results anew; 1 if some could not be."""
    with losses_noted() as lost:
        write_results(made)
    if lost:  # each of which was warned of
        return 1
    logger.info("written: %s", made.folder / "index.html")
    return 0


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
    todo, all_jobs = [*states.values()].count("to do"), len(made.jobs)
    done = [job for job in made.jobs if states[job.tag] == "done"]
    took = [seconds for job in done if (seconds := made.seconds(job))]
    hours = "time unknown until a job is done"
    if took:
        hours = f"about {todo * sum(took) / len(took) / 3600:.1f} hours of one device, by those that are done"
    Console().print(f"{todo} of {all_jobs} job{'s' * (all_jobs != 1)} to do; {hours}", highlight=False)


class Display:
    """A table of what runs on a terminal, else a line for each change. Now and then it writes the results."""

    def __init__(self, made: Sweep, capacity: int) -> None:
        self.made, self.capacity = made, capacity
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
            self._live.update(self._table(entries), refresh=True)
        if time.monotonic() - self._gathered > GATHER_SECONDS:
            write_results(self.made)
            self._gathered = time.monotonic()

    def _table(self, entries: Sequence[Entry]) -> Table:
        left = seconds_left(entries, self.capacity)
        eta = "" if left is None else f", about {left / 60:.0f} min left"
        table = Table("job", "", title=Text(counts(entries) + eta), title_justify="left", expand=True)
        for entry in entries:
            if entry.state is State.RUNNING:
                table.add_row(Text(printable(entry.job.name)), Text(printable(last_line(entry.log))))
        return table


def last_line(log: Path) -> str:
    """What a task said last; "" if nothing."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 1000))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
