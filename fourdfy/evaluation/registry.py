"""The numbers that scenes are judged by, each with the direction in which it gets better.

A number that only needs a scene is a function with ``@metric``, in this package or in a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Best = Literal["lowest", "highest"]


@dataclass(frozen=True)
class Metric:
    """A number of a finished stage."""

    name: str
    best: Best
    measure: Callable[[Any], float | None] | None = None
    """Its value for an ``evaluation.views.Views``; None for what is not defined there (a still scene has no
    motion). Without a function, the number comes from the curves or from a ground truth."""
    needs: tuple[str, ...] = ()
    """Networks that it asks: ``clip``, ``xclip``."""
    logged: bool = False
    """Whether training itself leaves it in the curves; the others are written by ``--evaluate``."""


PRIOR = "prior"
"""The mean of the priors' losses over the last quarter of a stage, from its curves."""

METRICS = {
    entry.name: entry
    for entry in (
        Metric(PRIOR, "lowest", logged=True),
        # How much the most changing pixel changes, at the last validation: see ``callbacks.scene_watch``.
        Metric("motion", "highest", logged=True),
        # With a ground truth; see ``report.ShapesReport``.
        Metric("iou", "highest"),
        Metric("psnr", "highest"),
        Metric("colour_error", "lowest"),
        Metric("motion_corr", "highest"),
        Metric("untracked", "lowest"),
        Metric("still_drift", "lowest"),
        Metric("fronts", "lowest"),
        Metric("mark_seen", "highest"),
        Metric("ghosts", "lowest"),
        # Of creatures alone; see ``report.CreatureReport``.
        Metric("colours_right", "highest"),
        Metric("parts_right", "highest"),
        Metric("faces", "lowest"),
    )
}
"""Name -> metric, of this package and of the plugins that were imported."""


def metric(best: Best, *needs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Function decorator: make it known as a metric under its own name.

    Raises:
        ValueError: another metric has the name.
    """

    def wrap(measure: Callable[..., Any]) -> Callable[..., Any]:
        name, known = measure.__name__, METRICS.get(measure.__name__)
        if known and getattr(known.measure, "__module__", None) != measure.__module__:  # not imported again
            raise ValueError(f"a metric {name!r} is already registered")
        METRICS[name] = Metric(name, best, measure, needs)
        return measure

    return wrap


def directions() -> dict[str, str]:
    """Metric -> ``lowest`` or ``highest``, whichever is better."""
    return {name: entry.best for name, entry in METRICS.items()}


def find_metric(name: str) -> Metric:
    """The metric of this name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}; expected one of {', '.join(sorted(METRICS))}")
    return METRICS[name]
