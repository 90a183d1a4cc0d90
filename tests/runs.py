"""A run for the tests of callbacks, without a system."""

from types import SimpleNamespace
from typing import Any

from fourdfy.callbacks.base import Run, RunningMeans


def new_run(
    step: int = 0, *, max_steps: int = 100, label: str = "", optimizer: Any = None, **parts: Any
) -> Run:
    """A run whose system is at ``step``; ``parts`` are further attributes."""
    run = object.__new__(Run)
    vars(run).update(
        system=SimpleNamespace(step=step),
        max_steps=max_steps,
        label=label,
        optimizer=optimizer,
        means=RunningMeans(),
        stopping=False,
        scheduler=None,
    )
    vars(run).update(parts)
    return run
