"""The interfaces of the parts of a NeRF: geometry, material, background and renderer.

N points, F frames of H x W pixels. ``step`` is the global step, for schedules that anneal with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.config import Component
from fourdfy.scenes.base import IsosurfaceConfig
from fourdfy.types import Budget, FieldOutput, RayBundle, RenderOutput, StepContext, TensorRecord


class Geometry(Component, nn.Module, ABC):
    """A volume density and features over space and time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(IsosurfaceConfig, Component.Config):
        @property
        def num_features(self) -> int | None:
            """How many features ``forward`` returns; None if the config does not say."""
            return None

        @property
        def has_normals(self) -> bool:
            """Whether ``forward`` can return normals."""
            return True

        @property
        def has_deformation(self) -> bool:
            """Whether ``forward`` returns a deformation."""
            return False

    cfg: Config

    @property
    @abstractmethod
    def radius(self) -> float:
        """Half side of the scene's cube, in scene units."""

    @abstractmethod
    def forward(
        self,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        *,
        step: int,
        want_normals: bool = False,
    ) -> FieldOutput:
        """Density, features and, on request, normals at points in scene units and times in 0..1."""

    @abstractmethod
    def density(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], *, step: int
    ) -> Float[Tensor, "N"]:
        """The density alone: what ``forward`` returns as ``sigmas``."""

    @abstractmethod
    def dynamic_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that make the scene move; all others are the static scene."""


@dataclass(frozen=True, kw_only=True)
class ShadingPoints(TensorRecord):
    """Points with their viewing and light directions."""

    positions: Float[Tensor, "N 3"]
    directions: Float[Tensor, "N 3"]
    """The rays', of unit length, from the camera on."""
    light_positions: Float[Tensor, "N 3"]


class Material(Component, nn.Module, ABC):
    """From a geometry's features to colours."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        def check_features(self, count: int) -> None:
            """Raise a ValueError unless colours can be made of ``count`` features."""

    requires_normal: bool = False

    @abstractmethod
    def forward(
        self, field: FieldOutput, points: ShadingPoints, context: StepContext
    ) -> Float[Tensor, "N 3"]:
        """Colours in 0..1 of points, from what the geometry says of them."""


class Background(Component, nn.Module, ABC):
    """What a ray sees behind the scene."""

    @abstractmethod
    def forward(
        self, directions: Float[Tensor, "F H W 3"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "F H W 3"]:
        """Colours in 0..1; a ``generator`` (in training) allows random augmentation."""


@dataclass(frozen=True)
class Parts:
    """The parts that a renderer draws. It is no module, so that a renderer does not own (and save) them."""

    geometry: Geometry
    material: Material
    background: Background


class Renderer(Component, nn.Module, ABC):
    """Rays to images."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            """See ``Scene.Config``."""
            return 0.0

        @property
        def wants_normals(self) -> bool:
            """Whether renders have normals even if the material does not need them."""
            return False

    cfg: Config

    def __init__(self, cfg: Config, parts: Parts) -> None:
        super().__init__()
        self.cfg, self.parts = cfg, parts

    @abstractmethod
    def forward(self, rays: RayBundle, context: StepContext, budget: Budget = "image") -> RenderOutput:
        """Images of all frames of ``rays``; see ``Scene.render``."""

    def bound_memory(self, available: float) -> None:
        """See ``Scene.bound_memory``."""
        return

    def halve_chunks(self, budget: Budget | None) -> dict[str, int]:
        """See ``Scene.halve_chunks``."""
        return {}

    def update_occupancy(self, context: StepContext, *, dynamic: bool) -> None:
        """Update the knowledge of empty space; called before every training step."""
        return
