"""What a renderer is to the rest of the system."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from fourdfy.config import Component
from fourdfy.scenes.nerf.base import Background, Geometry, Material
from fourdfy.types import Budget, RayBundle, RenderOutput


@dataclass(frozen=True)
class Parts:
    """What is rendered. No module, so that a renderer does not own (and save) the scene's weights."""

    geometry: Geometry
    material: Material
    background: Background


class Renderer(Component, nn.Module, ABC):
    """Rays to images."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            """About how many samples hold activations at once in a step of ``rays``; 0 where unknown.

            Args:
                occupied: share of the samples in the box that survive pruning.
                budget: names the bound of that step.
            """
            return 0.0

        @property
        def wants_normals(self) -> bool:
            """Whether renders have normals even where the material does not need them."""
            return False

    cfg: Config

    def __init__(self, cfg: Config, scene: Parts) -> None:
        super().__init__()
        self.cfg = cfg
        self.scene = scene

    @abstractmethod
    def forward(
        self,
        rays: RayBundle,
        *,
        step: int,
        generator: torch.Generator | None = None,
        sample_budget: Budget = "video",
    ) -> RenderOutput:
        """Images of all frames of ``rays``.

        Args:
            generator: training: samples are jittered, gradients flow. None: nothing random, no graph.
            sample_budget: names the bound of this step's memory, in training.
        """

    @abstractmethod
    def update_occupancy(self, *, step: int, dynamic: bool, generator: torch.Generator) -> None:
        """Refresh what is known to be empty; called before every training step."""
