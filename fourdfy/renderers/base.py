"""What a renderer is to the rest of the system."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from fourdfy.config import Component
from fourdfy.fields.base import Background, Geometry, Material
from fourdfy.types import RayBundle, RenderOutput


@dataclass(frozen=True)
class Scene:
    """What is rendered. No module, so that a renderer does not own (and save) the scene's weights."""

    geometry: Geometry
    material: Material
    background: Background


class Renderer(Component, nn.Module, ABC):
    """Rays to images."""

    def __init__(self, cfg: Component.Config, scene: Scene) -> None:
        super().__init__()
        self.cfg = cfg
        self.scene = scene

    @abstractmethod
    def forward(
        self, rays: RayBundle, *, step: int, generator: torch.Generator | None = None
    ) -> RenderOutput:
        """Images of all frames of ``rays``. With a generator (training) samples are jittered."""

    @abstractmethod
    def update_occupancy(self, *, step: int, dynamic: bool, generator: torch.Generator) -> None:
        """Refresh what is known to be empty; called before every training step."""
