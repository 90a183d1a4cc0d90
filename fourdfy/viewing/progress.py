"""What the page says of a training: step, speed, time left, losses and gradients by kind of step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from fourdfy.callbacks.base import Run
from fourdfy.systems.optim import gradient_norm

MOST_POINTS = 400
"""Of a curve; then every other one goes."""


@dataclass(frozen=True)
class Chart:
    """Curves over the global steps."""

    steps: list[int]
    curves: dict[str, list[float]]
    """By kind of step; before the first one of a kind, as at it."""


class Progress:
    """Collects what the panels show."""

    def __init__(self, run: Run) -> None:
        self.charts = {"loss": Chart([], {}), "gradient": Chart([], {})}
        """Means of the loss that is trained, and of the norm of the gradient of the prior's latents."""
        self.learning: dict[str, dict[str, float | None]] = {}
        """Kind of step -> optimizer group -> norm of its gradient in the last step that was looked at; None:
        the kind does not train it."""
        self._means: Mapping[str, float] = {}
        self._first, self._began, self._waited = run.step, time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """So long the run was paused."""
        self._waited += seconds

    def look(self, run: Run, kind: str) -> None:
        """Take the state after a step of a kind; waits for the GPU."""
        assert run.optimizer is not None, "only a training has steps"
        groups = run.optimizer.param_groups
        self.learning[kind] = {group["name"]: gradient_norm(group["params"]) for group in groups}
        self._means = dict(run.means.read())
        for name, key in (("loss", "loss/{}/total"), ("gradient", "{}/grad_norm")):
            _extend(self.charts[name], run.step, {k: self._means.get(key.format(k)) for k in self.kinds})

    @property
    def kinds(self) -> list[str]:
        """Those that have come so far."""
        return [key.split("/")[1] for key in self._means if key.endswith("/total")]

    def status(self, run: Run, taken: float) -> str:
        """Step, speed and time left, in Markdown; ``taken`` is the viewer's share of the time."""
        seconds = time.perf_counter() - self._began - self._waited
        rate = (run.step - self._first) / max(seconds, 1e-6)
        left = (run.max_steps - run.step) / rate if rate else math.inf
        eta = "-" if math.isinf(left) else str(timedelta(seconds=round(left)))
        return (
            f"step **{run.step}** of {run.max_steps}  \n"
            f"{rate:.2f} steps/s, {eta} left; the viewer takes {100 * taken:.0f} % of the time"
        )

    def losses(self) -> str:
        """The losses of each kind before their weights, as a Markdown table."""
        names = dict.fromkeys(key.split("/")[2] for key in self._means if key.startswith("loss/"))
        values = {name: [self._means.get(f"loss/{kind}/{name}") for kind in self.kinds] for name in names}
        rows = [[name, *map(_number, row)] for name, row in values.items()]
        return _table(["loss", *self.kinds], rows)

    def groups(self, run: Run) -> str:
        """Which groups learn, and by which kind of step, as a Markdown table of gradient norms."""
        assert run.optimizer is not None, "only a training has groups"
        rows = [
            [
                group["name"],
                _number(group["lr"]),
                *(_number(norms.get(group["name"])) for norms in self.learning.values()),
            ]
            for group in run.optimizer.param_groups
        ]
        return _table(["group", "rate", *self.learning], rows)


def _extend(chart: Chart, step: int, values: Mapping[str, float | None]) -> None:
    """Add a point to each curve; once known, a kind always has a value."""
    chart.steps.append(step)
    for kind, value in values.items():
        if value is not None:
            curve = chart.curves.setdefault(kind, [value] * (len(chart.steps) - 1))
            curve.append(value)
    if len(chart.steps) > MOST_POINTS:
        del chart.steps[1::2]
        for curve in chart.curves.values():
            del curve[1::2]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
