"""The interface of callbacks, which watch a run and may act on it; it is independent of the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fourdfy.config import Component
from fourdfy.data.base import DataModule, EvalBatch
from fourdfy.systems.base import System
from fourdfy.types import RenderOutput, StepBatch


class RunningMeans:
    """The mean of each scalar since it was last taken; nothing is read from the device before."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor | float, int]] = {}
        """Scalar -> its sum and count since it was last taken; all that a checkpoint needs."""
        self._taken: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means since the last call; counting then starts again."""
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums.clear()
        self._taken |= means
        return means

    def read(self) -> dict[str, float]:
        """Every scalar seen so far: its mean since it was last taken, else the value taken then."""
        return self._taken | {name: float(total) / count for name, (total, count) in self.sums.items()}


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
    stopping: bool = False

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
