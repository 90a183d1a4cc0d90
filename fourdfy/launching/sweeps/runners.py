"""Runners start the processes of a sweep: here or, each in a file of its own, on a cluster."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdfy.bounds import number
from fourdfy.config import Component
from fourdfy.config_files import PACKAGE
from fourdfy.registry import register
from fourdfy.signals import PARENT

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
STOP_SECONDS = 120.0
"""For tasks to save and end, once they are asked to stop."""


@dataclass(frozen=True)
class Task:
    """A process to be started."""

    arguments: tuple[str, ...]
    """What follows ``launch.py``, or another ``program``."""
    log: Path
    """Where stdout and stderr go, after what is there already."""
    name: str
    """A word for the queue of a cluster."""
    program: tuple[str, ...] = ("-m", "fourdfy.launching.cli")
    """What Python runs."""

    def run(self, environment: Mapping[str, str] | None = None) -> int:
        """Run it to its exit status; an exception meanwhile asks it to stop, and waits until it has."""
        process = self.start(environment)
        try:
            while (status := process.poll()) is None:  # Ray interrupts nothing that waits in C
                time.sleep(POLL_SECONDS)
            return status
        except BaseException:
            process.terminate()
            process.wait()
            raise

    def start(self, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start it; it stops, and saves, if this process is gone before it.

        Args:
            environment: variables besides this process's.
        """
        path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, *self.program, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid()), **(environment or {})},
                process_group=0,  # Ctrl-C is for the sweep, which then stops its tasks
            )


class Runner(Component, ABC):
    """Starts tasks; the sweep decides which and when.

    Args:
        gpu: ``cpu``, or None for a GPU where there is one.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        pass

    cfg: Config

    def __init__(self, cfg: Config, gpu: str | None = None) -> None:
        self.cfg, self.gpu = cfg, gpu

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tasks that should be started and not ended at a time."""

    @abstractmethod
    def start(self, tasks: Sequence[Task]) -> Iterable[Any]:
        """Start tasks, or queue them; gives a handle of each, as soon as it is there."""

    @abstractmethod
    def poll(self, handle: Any) -> int | None:
        """The exit status of a task, or None while it waits or runs; never waits."""

    @abstractmethod
    def stop(self, handle: Any) -> None:
        """Ask a task to stop, as SIGTERM does: it saves first."""


@register("local")
class LocalRunner(Runner):
    """Processes of this machine, each on one of its GPUs, or on the CPU if it has none."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Runner.Config):
        per_gpu: int = number(1, 1)
        """Processes at a time on each visible GPU, or on the CPU."""

    cfg: Config

    def __init__(self, cfg: Config, gpu: str | None = None) -> None:
        super().__init__(cfg, gpu)
        self._places = visible_gpus() if gpu != "cpu" else []
        self._free = (self._places or [""]) * cfg.per_gpu
        self._capacity, self._taken = len(self._free), dict[int, str]()

    @property
    def capacity(self) -> int:
        return self._capacity

    def start(self, tasks: Sequence[Task]) -> Iterator[subprocess.Popen[bytes]]:
        yield from map(self._start, tasks)

    def _start(self, task: Task) -> subprocess.Popen[bytes]:
        place = self._free.pop(0)
        threads = max(1, processors() // self.capacity)
        shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        process = task.start({"CUDA_VISIBLE_DEVICES": place, **shared})
        self._taken[process.pid] = place
        return process

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        status = handle.poll()
        if status is not None and handle.pid in self._taken:
            self._free.append(self._taken.pop(handle.pid))
        return status

    def stop(self, handle: subprocess.Popen[bytes]) -> None:
        handle.send_signal(signal.SIGTERM)


def run_all(tasks: Sequence[Task], runner: Runner) -> list[int]:
    """Run tasks, as many at a time as the runner takes; gives their exit statuses.

    What is raised stops them first.
    """
    handles: list[Any] = []
    statuses: dict[int, int] = {}
    try:
        while len(statuses) < len(tasks):
            for handle in runner.start(tasks[len(handles) : len(statuses) + runner.capacity]):
                handles.append(handle)
            for index, handle in enumerate(handles):
                if index not in statuses and (status := runner.poll(handle)) is not None:
                    statuses[index] = status
            time.sleep(POLL_SECONDS)
    except BaseException:
        stop_all(runner, [handle for index, handle in enumerate(handles) if index not in statuses])
        raise
    return [statuses[index] for index in range(len(tasks))]


def stop_all(runner: Runner, handles: Sequence[Any]) -> None:
    """Have tasks save and end, and wait for them."""
    until = time.monotonic() + STOP_SECONDS
    if handles:
        logger.info("stopping %d jobs, which save first", len(handles))
    for handle in handles:
        runner.stop(handle)
    while left := sum(runner.poll(handle) is None for handle in handles):
        if time.monotonic() > until:
            logger.warning("jobs that have not ended, and go on by themselves: %d", left)
            return
        time.sleep(POLL_SECONDS)


def processors() -> int:
    """How many this process may use, which on a cluster can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """As ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name for name in named.split(",") if name]
