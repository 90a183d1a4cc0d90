"""Steps of each kind in turn, in an ordinary run, and a callback that measures them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from statistics import fmean, median
from typing import Any

import torch
from profiling import PARTS, PartTimes, kernels, synchronisations
from timing import synchronize
from torch.utils.data import IterableDataset

from fourdfy.callbacks.base import Callback, Run
from fourdfy.launching.experiment import Experiment
from fourdfy.types import StepBatch, StepContext

EARLY, MILESTONE, LATE = 2000, 5000, 6000
"""The paper's milestone of the resolution, and global steps before and after it, multiples of the occupancy
grid's interval."""
KNOWN_AFTER = 256
"""Steps of training that the occupancy grid sees first."""


@dataclass(frozen=True)
class Block:
    """Steps of one kind, from the global step ``start``."""

    kind: str
    start: int
    height: int
    shares: tuple[float, float]
    """Of all steps before and after the milestone of the resolution."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.height}"


def blocks_of(experiment: Experiment) -> list[Block]:
    """Every kind at full size and, where it begins smaller, at that size."""
    blocks = []
    for kind in experiment.plan.kinds:
        early, late = (
            kind.cameras.sample(StepContext(step, torch.Generator().manual_seed(0))).height
            for step in (EARLY, LATE)
        )
        share = kind.probability
        if early != late:
            blocks.append(Block(kind.name, EARLY, early, (share, 0.0)))
        blocks.append(Block(kind.name, LATE, late, (0.0 if early != late else share, share)))
    return blocks


class Batches(IterableDataset):
    """The batches that the stopwatch wants, from the experiment's own loaders."""

    def __init__(self, experiment: Experiment, stopwatch: Stopwatch, parts: int) -> None:
        self.experiment, self.stopwatch, self.parts = experiment, stopwatch, parts

    def __iter__(self) -> Iterator[StepBatch]:
        for block in self.stopwatch.blocks:
            data = self.experiment.build_data()
            data.choose_kind = lambda step, kind=block.kind: kind  # type: ignore
            for first, count in self.stopwatch.stretches(block):
                yield from islice(iter(data.train_dataloader(first, self.parts)), count * self.parts)


class Timer(Callback):
    """Times blocks of steps, and keeps the scene as it is. A subclass says what follows in each block."""

    def __init__(self, experiment: Experiment, args: argparse.Namespace) -> None:
        super().__init__()
        self.blocks, self.steps, self.warm_up = blocks_of(experiment), args.steps, args.warm_up

    def stretches(self, block: Block) -> list[tuple[int, int]]:
        """(first global step, number of steps): warmed up and timed."""
        return [(block.start - self.warm_up, self.warm_up + self.steps)]

    @property
    def total(self) -> int:
        return sum(count for block in self.blocks for _, count in self.stretches(block))

    def begin(self, run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        batch = run.data.batch(0).to(run.system.device)
        for step in range(0, KNOWN_AFTER, 16):
            run.system.before_step(replace(batch, step=step))
        self.script = self._measure(run)
        next(self.script)

    def after_step(self, run: Run, batch: StepBatch, losses: Any) -> None:
        next(self.script, None)

    def _measure(self, run: Run) -> Iterator[None]:
        """Each ``yield`` is a step of the run."""
        for block in self.blocks:
            found: dict[str, Any] = {"shares": block.shares}
            yield from self._time(run, block, found)
            yield from self._go_on(run, block, found)

    def _time(self, run: Run, block: Block, found: dict[str, Any]) -> Iterator[None]:
        began = time.perf_counter()
        for _ in range(self.warm_up):
            yield
        synchronize()
        warm = time.perf_counter()
        run.means.take()
        reset_peaks()
        marks = [mark()]
        for _ in range(self.steps):
            yield
            marks.append(mark())
        synchronize()
        timed = time.perf_counter()
        found |= summary([elapsed_ms(a, b) for a, b in pairwise(marks)]) | peaks()
        found["samples"] = run.means.take().get(f"{block.kind}/samples")
        found["seconds"] = {"warm-up": warm - began, "timed": timed - warm}

    def _go_on(self, run: Run, block: Block, found: dict[str, Any]) -> Iterator[None]:
        """What else is measured of a block whose times are ``found``."""
        raise NotImplementedError


class Stopwatch(Timer):
    """Measures times, parts, kernels and waits of blocks of steps."""

    def __init__(
        self,
        experiment: Experiment,
        args: argparse.Namespace,
        done: Callable[[Block, dict[str, Any]], None],
    ) -> None:
        super().__init__(experiment, args)
        self.done = done
        self.in_parts, self.profiled = (
            (0, 0) if args.times_only else (min(16, self.steps), min(4, self.steps))
        )

    def stretches(self, block: Block) -> list[tuple[int, int]]:
        """(first global step, number of steps): warmed up and timed, in parts, profiled and checked."""
        return [
            *super().stretches(block),
            (block.start, self.in_parts),
            (block.start + 1, self.profiled),
            (block.start + 1, self.profiled),
        ]

    def _go_on(self, run: Run, block: Block, found: dict[str, Any]) -> Iterator[None]:
        if self.in_parts:
            self.done(block, found)  # the rest may fail
            timed = time.perf_counter()
            yield from self._profile(run, found)
            found["seconds"]["profiled"] = time.perf_counter() - timed
        self.done(block, found)

    def _profile(self, run: Run, found: dict[str, Any]) -> Iterator[None]:
        with PartTimes().watch(run.system) as parts:
            for _ in range(self.in_parts):
                yield
                parts.end_step()
        found["parts_ms"] = {name: 1000 * parts.seconds[name] / self.in_parts for name in PARTS}
        with kernels(self.profiled) as work:
            for _ in range(self.profiled):
                yield
        found |= work
        with synchronisations() as waits:
            for _ in range(self.profiled):
                yield
        found["waits"] = {place: count / self.profiled for place, count in waits.most_common()}


def mark() -> Any:
    """A moment on the GPU's own clock, or the CPU's without one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(before: Any, after: Any) -> float:
    return 1000 * (after - before) if isinstance(before, float) else before.elapsed_time(after)


def reset_peaks() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def summary(ms: list[float]) -> dict[str, Any]:
    return {"steps": len(ms), "mean": fmean(ms), "median": median(ms), "min": min(ms), "max": max(ms)}
