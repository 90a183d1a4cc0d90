"""The loop of a sweep: start what is to be done, see what has ended, until nothing is left."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any

from fourdfy.config_files import ConfigError
from fourdfy.files.atomic import by_product, write_whole
from fourdfy.launching.sweeps.jobs import Job, Sweep
from fourdfy.launching.sweeps.results import not_kept, numbers, score_of
from fourdfy.launching.sweeps.runners import POLL_SECONDS, Runner, Task, stop_all
from fourdfy.launching.trial import IN_USE

logger = logging.getLogger(__name__)

ELSEWHERE_SECONDS = 5.0
"""Between two looks at trials that other processes own."""


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ELSEWHERE = "running elsewhere"
    """Some process that this sweep did not start owns a trial of it."""
    DONE = "done"
    FAILED = "failed"
    DROPPED = "dropped"
    """Others of its prompt and settings were better."""


@dataclass
class Entry:
    """A job and how far it is."""

    job: Job
    log: Path
    stages: int
    """How many of its stages it is to train, for the time being."""
    state: State = State.WAITING
    failures: int = 0
    handle: Any = None
    began: float = 0.0
    seconds: float = 0.0
    """Of its processes so far."""


class Scheduler:
    """Runs a sweep with a runner.

    Args:
        show: called with all entries after each change, and now and then.
    """

    def __init__(self, sweep: Sweep, runner: Runner, show: Callable[[Sequence[Entry]], None]) -> None:
        self.sweep, self.cfg, self.runner, self.show = sweep, sweep.cfg, runner, show
        _, self.first = sweep.kept
        stages = self.first or len(sweep.jobs[0].trials)
        self.entries = [Entry(job, sweep.log(job), stages) for job in sweep.jobs]
        self._looked = 0.0

    def run(self) -> None:
        """Until every job is done, dropped, or has failed too often. What is raised stops the tasks first."""
        for entry in self.entries:
            self._look(entry)
        try:
            while self._advance():
                time.sleep(POLL_SECONDS)
        except BaseException:
            running = self._in(State.RUNNING)
            stop_all(self.runner, [entry.handle for entry in running])
            for entry in running:
                if self.runner.poll(entry.handle) is not None:
                    self._note(entry, "stopped")
            raise

    def _advance(self) -> bool:
        """Whether anything is left to wait for."""
        for entry in self._in(State.RUNNING):
            if (status := self.runner.poll(entry.handle)) is not None:
                self._ended(entry, status)
        if time.monotonic() - self._looked > ELSEWHERE_SECONDS:
            self._looked = time.monotonic()
            for entry in self._in(State.ELSEWHERE):
                self._look(entry)
        self._keep_the_best()
        room = self.runner.capacity - len(self._in(State.RUNNING))
        self._start(self._in(State.WAITING)[: max(room, 0)])
        self.show(self.entries)
        return bool(self._in(State.WAITING, State.RUNNING, State.ELSEWHERE))

    def _in(self, *states: State) -> list[Entry]:
        return [entry for entry in self.entries if entry.state in states]

    def _look(self, entry: Entry) -> None:
        """Take an entry's state from its folders."""
        if entry.job.has_finished(entry.stages):
            entry.state = State.DONE
        else:
            entry.state = State.ELSEWHERE if entry.job.is_owned else State.WAITING

    def _start(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._look(entry)  # some other sweep may have been faster
        entries = [entry for entry in entries if entry.state is State.WAITING and self._has_log(entry)]
        tasks = []
        for entry in entries:
            with by_product("settings of jobs"):
                write_whole(self.sweep.record(entry.job), json.dumps(entry.job.given))
            entry.began = time.monotonic()
            stages = () if entry.stages == len(entry.job.trials) else ("--stages", str(entry.stages))
            device = ("--gpu", "cpu") if self.runner.gpu == "cpu" else ()
            tasks.append(Task((*entry.job.arguments, *stages, *device), entry.log, entry.job.tag))
        for entry, handle in zip(entries, self.runner.start(tasks), strict=True):
            entry.handle, entry.state = handle, State.RUNNING

    def _has_log(self, entry: Entry) -> bool:
        """Whether its log can be written; without one, a job fails and the others go on."""
        try:
            entry.log.parent.mkdir(parents=True, exist_ok=True)
            open(entry.log, "ab").close()
        except OSError as error:
            entry.state = State.FAILED
            logger.warning("%s: %s: %s", entry.job.name, entry.log, error.strerror)
        return entry.state is State.WAITING

    def _ended(self, entry: Entry, status: int) -> None:
        self._note(entry, f"exit status {status}")
        self._look(entry)
        if entry.state is not State.WAITING or status == IN_USE:  # some other process was faster
            return
        entry.failures += 1
        what = f"exit status {status}" if status else "it ended without test views"
        if entry.failures > self.cfg.retries or status == 2:  # a mistake in its config stays one
            entry.state = State.FAILED
        again = "; it is started again" if entry.state is State.WAITING else ""
        logger.warning("%s: %s%s; see %s", entry.job.name, what, again, entry.log)

    def _note(self, entry: Entry, end: str) -> None:
        """The time that its process took, and its end, in its log; see ``Sweep.seconds``."""
        seconds = time.monotonic() - entry.began
        entry.seconds += seconds
        with by_product("logs of jobs"), open(entry.log, "a", encoding="utf-8") as log:
            log.write(f"\n# {seconds:.1f} s, {end}\n")

    def _keep_the_best(self) -> None:
        """Once all seeds of a prompt and settings have come to the stage after which some are dropped."""
        if not self.first:
            return
        for _, group in groupby(self.entries, key=lambda entry: (entry.job.prompt, entry.job.settings)):
            seeds = [entry for entry in group if entry.stages == self.first]
            if not seeds or any(entry.state not in (State.DONE, State.FAILED) for entry in seeds):
                continue
            come = [entry for entry in seeds if entry.state is State.DONE]
            self._check_column([entry.job for entry in come])
            losers = not_kept(self.sweep, [entry.job for entry in come])
            for entry in come:
                if entry.job.tag in losers:
                    entry.state, entry.stages = State.DROPPED, 0
                else:
                    entry.stages = len(entry.job.trials)
                    self._look(entry)

    def _check_column(self, done: Sequence[Job]) -> None:
        """Refuse a ``keep_by`` that none of them has a number for."""
        _, metric = self.sweep.keep_by
        if done and all(score_of(job, metric, self.first) is None for job in done):
            known = (
                ", ".join(sorted({name for job in done for name in numbers(job, self.first)})) or "nothing"
            )
            raise ConfigError(
                f"keep_by: {done[0].name}: no {metric!r} after stage {self.first}; there is {known}"
            )


def counts(entries: Sequence[Entry]) -> str:
    """Such as ``2 running, 5 waiting, 1 done``."""
    found = Counter(entry.state for entry in entries)
    return ", ".join(f"{found[state]} {state}" for state in State if found[state])


def seconds_left(entries: Sequence[Entry], capacity: int) -> float | None:
    """If jobs take as long as those that this sweep has finished did; None if none has been."""
    took = [entry.seconds for entry in entries if entry.state is State.DONE and entry.seconds]
    if not took:
        return None
    mean, now = sum(took) / len(took), time.monotonic()
    left = [max(mean - (now - e.began), 0.0) for e in entries if e.state is State.RUNNING]
    left += [mean for entry in entries if entry.state is State.WAITING]
    return max(sum(left) / capacity, max(left, default=0.0))  # a job is not divided
