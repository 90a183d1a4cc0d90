"""The interface of a system to the launcher and to the training loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fourdfy.config import Component, file_path
from fourdfy.data.base import DataModule
from fourdfy.guidance.base import Guidance
from fourdfy.systems.supervision import StepConfig, SupervisionPlan, plan_supervision
from fourdfy.types import Cameras, RenderOutput, StepBatch


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """``system.loggers.wandb``, by threestudio's names: Weights & Biases, an optional package. Its variables
    (``WANDB_MODE=offline``) work."""

    enable: bool = False
    """Whether to log to Weights & Biases."""
    project: str = "fourdfy"
    """Project in Weights & Biases that the run belongs to."""
    name: str | None = None
    """Name of the run; null: that of the trial's folder."""


@dataclass(frozen=True, kw_only=True)
class LoggersConfig:
    """``system.loggers``: where curves go besides the trial's own ``tb_logs`` and ``csv_logs``."""

    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The result of one training step."""

    loss: Tensor
    """The weighted sum that is minimized; carries the graph."""
    losses: Mapping[str, Tensor]
    """Every loss of the step by name, before its weight, without a graph."""
    loss_weights: Mapping[str, float]
    """The weights, by name, of the losses that are on."""
    metrics: Mapping[str, Tensor | float]
    """Other scalars to log."""


class DoesNotFit(torch.OutOfMemoryError):
    """A step or an evaluation needs more memory than there is, and has changed nothing."""


class System(Component, nn.Module):
    """A scene in training. It does not depend on the trainer: steps and devices are arguments.

    Its ``state_dict`` is what a checkpoint holds.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        weights: str | None = file_path()
        """A checkpoint to start from: its scene, occupancy and LoRA, not its step or optimizer."""
        loggers: LoggersConfig = field(default_factory=LoggersConfig)

        @property
        def prompt(self) -> str | None:
            """The prompt of the scene."""
            return None

        @property
        def absent_parts(self) -> set[str]:
            """Parts that an optimizer group may name although this scene has none."""
            return set()

        def plan(self, data: DataModule.Config, steps: Mapping[str, StepConfig]) -> SupervisionPlan:
            """The plan of what supervises the scene; see ``plan_supervision``."""
            return plan_supervision(self, data, steps)

        def check(self, data: DataModule.Config, plan: SupervisionPlan) -> None:
            """Refuse parts that contradict each other, or the frames of ``data``.

            Raises:
                ConfigError: names both keys and what to type.
            """

    cfg: Config
    step: int
    """How many global steps the scene was trained; evaluation anneals as at this step."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def prepare(self, device: torch.device, *, resumed: bool) -> None:
        """Prepare for training: load the priors onto ``device`` and, unless ``resumed``, load what fits by
        name from ``system.weights``."""

    def bound_memory(self, budget: float) -> None:
        """Keep training within so many bytes of GPU memory, as far as that changes no result beyond rounding.
        Called once before the first step, on a GPU."""
        return

    def halve_chunks(self, batch: StepBatch | None) -> dict[str, int]:
        """Compute half as much at once from now on. Called when the GPU's memory was not enough for
        a step with this ``batch``, or for something without gradients (None), which is then repeated.

        Returns:
            The settings that would have done the same, by the config's keys; none if nothing can be halved.
        """
        return {}

    @abstractmethod
    def configure_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, after ``prepare``; each of its groups has a ``name``."""

    def untrained(self) -> Iterator[nn.Parameter]:
        """The scene's parameters that no step of this stage trains; the system may not be prepared."""
        return iter(())

    @abstractmethod
    def configure_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """The learning-rate scheduler at step 0; it takes a step after each of the optimizer's."""

    def guidances(self) -> Mapping[str, Guidance]:
        """What supervises a training, by kind of step, after ``prepare``; for those who look on."""
        return {}

    @abstractmethod
    def before_step(self, batch: StepBatch) -> None:
        """Called before each training step."""

    @abstractmethod
    def training_step(self, batch: StepBatch) -> StepOutput:
        """The losses of a batch at ``batch.step``."""

    @abstractmethod
    def after_backward(self, batch: StepBatch, optimizer: torch.optim.Optimizer) -> None:
        """Called before the optimizer's step, with unscaled gradients in place."""

    @abstractmethod
    def render(self, cameras: Cameras) -> RenderOutput:
        """Render frames for evaluation."""

    @abstractmethod
    def export(self, folder: Path, cameras: Mapping[str, Cameras]) -> list[Path]:
        """Write what ``system.exporter`` says into ``folder``; ``cameras`` are the data module's
        evaluation sequences. Returns the files."""

    @abstractmethod
    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the scene and the step of a checkpoint, and what it holds of the priors that are loaded."""
