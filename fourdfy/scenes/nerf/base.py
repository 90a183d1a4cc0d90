"""What a geometry, a material and a background are to the rest of the system.

N points, F frames of H x W pixels. ``step`` is the global step, for schedules that anneal with it;
``generator`` is None in evaluation, where nothing is random.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.config import Component
from fourdfy.types import FieldOutput


class Geometry(Component, nn.Module, ABC):
    """A volume density and features over space and time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        @property
        def num_features(self) -> int | None:
            """How many features ``forward`` gives; None where the config does not say."""
            return None

        @property
        def has_normals(self) -> bool:
            """Whether ``forward`` can give normals."""
            return True

        @property
        def has_deformation(self) -> bool:
            """Whether ``forward`` gives a deformation."""
            return False

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
        """Density, features and (asked for) normals at points in scene units, times in 0..1."""

    @abstractmethod
    def density(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], *, step: int
    ) -> Float[Tensor, "N"]:
        """The density alone: what ``forward`` gives as ``sigmas``."""

    @abstractmethod
    def dynamic_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that make the scene move; all others are the static scene."""

    def static_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that is not dynamic."""
        dynamic = {id(parameter) for parameter in self.dynamic_parameters()}
        return (p for p in self.parameters() if id(p) not in dynamic)


class Material(Component, nn.Module, ABC):
    """From a geometry's features to colours."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        def check_features(self, count: int) -> None:
            """Raise a ValueError unless colours can be made of ``count`` features."""

    requires_normal: bool = False

    @abstractmethod
    def forward(
        self,
        features: Float[Tensor, "N C"],
        *,
        positions: Float[Tensor, "N 3"],
        normals: Float[Tensor, "N 3"] | None,
        light_positions: Float[Tensor, "N 3"],
        directions: Float[Tensor, "N 3"],
        step: int,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "N 3"]:
        """Colours in 0..1; ``directions`` are the rays', of unit length, from the camera on."""


class Background(Component, nn.Module, ABC):
    """What a ray sees behind the scene."""

    @abstractmethod
    def forward(
        self, directions: Float[Tensor, "F H W 3"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "F H W 3"]:
        """Colours in 0..1; ``generator`` (training) allows random augmentation."""
