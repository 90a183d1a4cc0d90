"""What a scene is to the rest of the system.

F frames of H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourdfy.config import Component
from fourdfy.types import Budget, Cameras, RenderOutput, StepContext


class Scene(Component, nn.Module, ABC):
    """What is rendered and learns: a NeRF, or anything else with parameters that renders itself."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        @property
        def renders(self) -> frozenset[str]:
            """The optional fields of ``RenderOutput`` that its renders have."""
            return frozenset()

        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            """About how many samples hold activations at once in a step of ``rays``; 0 where unknown.

            Args:
                occupied: share of the samples that survive pruning.
            """
            return 0.0

        def check_scene(self, *, dynamic: bool) -> None:
            """Raise a ConfigError unless the scene's parts fit each other and a stage that is ``dynamic``."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg

    @abstractmethod
    def render(self, cameras: Cameras, context: StepContext, budget: Budget = "image") -> RenderOutput:
        """Images of all frames; without a generator in the ``context`` nothing is random, and no graph is
        built."""

    @abstractmethod
    def halves(self) -> dict[str, list[nn.Parameter]]:
        """All parameters: ``dynamic`` ones make the scene move, and the others are ``static``."""

    def before_step(self, context: StepContext, *, dynamic: bool) -> None:
        """What is due before a training step; ``dynamic``: the scene moves in this stage."""
        return

    def after_backward(self, context: StepContext, optimizer: torch.optim.Optimizer) -> None:
        """What is due between the gradients of a training step and the optimizer's, e.g. densification."""
        return

    def fit_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the shapes of ``state`` before it is loaded: for a scene whose number of points changes.

        Parameters are resized in place (``parameter.data = ...``), as an optimizer may hold them already.
        What then has another shape in ``state`` is refused by name.
        """
        return
