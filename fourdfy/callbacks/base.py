"""The interface of callbacks, which watch a run and may act on it; it is independent of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fourdfy.config import Component
from fourdfy.data.base import DataModule, EvalBatch
from fourdfy.ops.reading import Reading
from fourdfy.systems.base import System
from fourdfy.types import RenderOutput, StepBatch


class Means(Mapping[str, float]):
    """Means by name. Looking at one waits for all that are still on their way from the GPU."""

    def __init__(self, sums: Mapping[str, tuple[Tensor | float, int]]) -> None:
        self._sums = dict(sums)
        self._coming = [n for n, (total, _) in sums.items() if isinstance(total, Tensor) and total.is_cuda]
        totals = [sums[name][0].double() for name in self._coming]  # type: ignore[union-attr]
        self._reading = Reading(torch.stack(totals)) if totals else None

    @property
    def is_ready(self) -> bool:
        """Whether nobody has to wait."""
        return self._reading is None or self._reading.is_ready

    def __getitem__(self, name: str) -> float:
        if self._reading is not None:
            for coming, number in zip(self._coming, self._reading.numbers(), strict=True):
                self._sums[coming] = number, self._sums[coming][1]
            self._reading = None
        total, count = self._sums[name]
        return float(total) / count

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


class RunningMeans:
    """The mean of each scalar since it was last taken; nothing waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor | float, int]] = {}
        """Scalar -> its sum and count since it was last taken; all that a checkpoint needs."""
        self._taken: dict[str, tuple[Tensor | float, int]] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value if count else value, count + 1)

    def take(self) -> Means:
        """The means since the last call; counting then starts again."""
        means = Means(self.sums)
        self._taken |= self.sums
        self.sums = {}
        return means

    def read(self) -> Means:
        """Every scalar seen so far: its mean since it was last taken, else the value taken then."""
        return Means(self._taken | self.sums)


@dataclass(kw_only=True)
class Run:
    """A stage that is trained, or a trial that is rendered, as callbacks see it."""

    system: System
    data: DataModule
    folder: Path
    """The folder of the trial."""
    label: str
    """``stage 1/3``, or what is done with a trial: ``test``, ``validate``."""
    max_steps: int
    means: RunningMeans = field(default_factory=RunningMeans)
    """``loss/{kind}/{name}``, ``weight/{kind}/{name}`` and other ``{kind}/{name}``, for curves and
    progress. The loss ``total`` is the weighted sum, which is trained."""
    optimizer: Optimizer | None = None
    """Each of its groups has a ``name``; None if nothing is trained."""
    scheduler: LRScheduler | None = None
    """Changes the learning rates; None: they are constant."""
    save: Callable[[Path], None] = lambda path: None
    """Write a checkpoint; available from ``begin`` on."""
    grew_from: str | None = None
    """The hash of the scene that ``system.weights`` held when the stage began (``systems.checkpoint``)."""
    stopping: bool = False
    is_asked_to_stop: Callable[[], bool] = lambda: False
    """Whether a signal came since the last step; for callbacks that wait for something."""

    @property
    def step(self) -> int:
        """Number of finished global steps."""
        return self.system.step

    def stop(self) -> None:
        """End the training after this step, with a checkpoint; later stages are not started."""
        self.stopping = True


class Callback(Component):
    """Hooks that are called during a run; all of them are optional.

    Registered, it can be named in ``trainer.callbacks``; an instance can be given to ``fourdfy.train``.
    """

    on_all_ranks = False
    """Whether it is called on every rank of a run on several GPUs; others on the first alone, where a render
    is the whole image."""
    is_essential = False
    """Whether a ``WriteError`` of the callback ends the run, instead of costing a warning."""

    def __init__(self, cfg: Component.Config | None = None) -> None:
        """``cfg`` is an instance of the class's own ``Config``; None for its defaults."""
        self.cfg = self.Config() if cfg is None else cfg

    def begin(self, run: Run) -> None:
        """Called before the first training step; in a resumed run, ``run.step`` is not 0."""

    def after_step(self, run: Run, batch: StepBatch, losses: Mapping[str, Tensor]) -> None:
        """Called after each global step, whose number is ``run.step - 1``.

        Args:
            batch: what the step (or the last of its accumulated parts) was computed on.
            losses: by name, before their weights and without a graph; means over the parts.
        """

    def after_frames(
        self, run: Run, batch: EvalBatch, frames: RenderOutput, *, done: int, total: int
    ) -> None:
        """Called after each of the ``total`` batches of a validation or test; ``done`` starts at 1."""

    def after_validation(self, run: Run) -> None:
        """Called when all validation views are rendered."""

    def after_test(self, run: Run) -> None:
        """Called when all test views are rendered."""

    def end(self, run: Run, error: BaseException | None) -> None:
        """Called after the last training step, or with the ``error`` that ended training or rendering."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs: tensors, numbers, texts, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; called before ``begin`` of a resumed run."""
