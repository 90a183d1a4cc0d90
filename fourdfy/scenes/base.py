"""The interface of a scene.

F frames of H x W pixels, N points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import Component, Schema
from fourdfy.types import Budget, Cameras, RenderOutput, StepContext


class Scene(Component, nn.Module, ABC):
    """What is rendered and trained: a NeRF, or anything else with parameters that renders itself."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        @property
        def renders(self) -> frozenset[str]:
            """The optional fields of ``RenderOutput`` that its renders have."""
            return frozenset()

        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            """Approximate number of samples with activations at once in a step of ``rays``; 0 if unknown.

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

    def bound_memory(self, available: float) -> None:
        """Keep what a training step stores for its backward pass within so many bytes of GPU memory, as far
        as that changes no result beyond rounding. Called once before training, on a GPU."""
        return

    def halve_chunks(self, budget: Budget | None) -> dict[str, int]:
        """Compute half as much at once from now on, as far as that changes no result beyond rounding.

        Called when the GPU's memory was not enough for a step with this ``budget``, or for something without
        gradients (None), which is then repeated.

        Returns:
            The settings that would have done the same, by their keys below the scene's config; none if
            nothing can be halved.
        """
        return {}

    def before_step(self, context: StepContext, *, dynamic: bool) -> None:
        """Called before each training step; ``dynamic`` says whether the scene moves in this stage.

        It is called again if it runs out of memory.
        """
        return

    def after_backward(self, context: StepContext, optimizer: torch.optim.Optimizer) -> None:
        """Called between backward pass and optimizer step, e.g. for densification."""
        return

    def fit_state(self, state: Mapping[str, Tensor]) -> None:
        """Adopt the shapes of ``state`` before it is loaded, in a scene whose number of points changes.

        Parameters are resized in place (``parameter.data = ...``), as an optimizer may hold them already.
        Tensors whose shape still differs from ``state`` are refused by name.
        """
        return


@dataclass(frozen=True, kw_only=True)
class IsosurfaceConfig(Schema):
    """How a mesh is extracted from a density."""

    isosurface_resolution: int = number(128, 2, 1024)
    """Samples of the density along each axis, for exported meshes."""
    isosurface_threshold: float | int | str = number("auto", above=0)
    """Density of the surface (25 in threestudio), or ``auto``: the one with the silhouettes of the
    rendered scene."""
    isosurface_chunk: int = number(0, 0, 1 << 26)
    """Points per call of the field; 0 for 131072."""
    isosurface_remove_outliers: bool = True
    """Drop small parts that are not connected to the rest."""
    isosurface_outlier_n_faces_threshold: float = number(0.01, 0, 1)
    """A part is small if it has fewer triangles than this share of the largest part's."""

    def __post_init__(self) -> None:
        if isinstance(given := self.isosurface_threshold, str) and given != "auto":
            raise ValueError(f"isosurface_threshold={given!r}: expected a number above 0 or 'auto'")


class VolumeScene(Scene):
    """A scene with a density in a cube around the origin, from which a mesh can be extracted.

    Positions are in scene units, times in 0..1; ``step`` is the global step that schedules are at.
    """

    @property
    @abstractmethod
    def radius(self) -> float:
        """Half side of the cube, in scene units."""

    @property
    def isosurface(self) -> IsosurfaceConfig:
        return IsosurfaceConfig()

    @abstractmethod
    def density(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], *, step: int
    ) -> Float[Tensor, "N"]:
        """Volume density per scene unit."""

    @abstractmethod
    def radiance(
        self,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        directions: Float[Tensor, "N 3"],
        *,
        step: int,
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N 3"]]:
        """The density, and colours as evaluation sees them along unit ``directions``, lit from the eye."""

    def displacement(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], *, step: int
    ) -> Float[Tensor, "N 3"] | None:
        """Displacement of each point to its place in the canonical scene; None if nothing is deformed."""
        return None
