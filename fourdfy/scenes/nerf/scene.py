"""The NeRF of 4D-fy: a field over space and time, a background, and the renderer that composites them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.config import ConfigError, slot
from fourdfy.ops.cameras import cast_rays
from fourdfy.scenes.base import IsosurfaceConfig, VolumeScene
from fourdfy.scenes.nerf.base import Background, Geometry, Material, Parts, Renderer, ShadingPoints
from fourdfy.scenes.nerf.encodings import HashGrid, OverTime
from fourdfy.types import Budget, Cameras, RenderOutput, StepContext


class NeRFScene(VolumeScene):
    """Its parts have the same names as in 4D-fy's checkpoints."""

    @dataclass(frozen=True, kw_only=True)
    class Config(VolumeScene.Config):
        geometry_type: str = "implicit-volume"
        geometry: Any = slot(Geometry, "geometry_type")
        material_type: str = "no-material"
        material: Any = slot(Material, "material_type")
        background_type: str = "neural-environment-map-background"
        background: Any = slot(Background, "background_type")
        renderer_type: str = "nerf-volume-renderer"
        renderer: Any = slot(Renderer, "renderer_type")

        def __post_init__(self) -> None:
            """Give each part what it needs of the others."""
            if self.wants_normals and not self.geometry.has_normals:
                raise ValueError(
                    "geometry.normal_type=null: the material or the renderer needs normals; use "
                    "system.geometry.normal_type=finite_difference"
                )
            if (features := self.geometry.num_features) is not None:
                self.material.check_features(features)

        @property
        def wants_normals(self) -> bool:
            return self.material.component.requires_normal or self.renderer.wants_normals

        @property
        def renders(self) -> frozenset[str]:
            fields = {"comp_rgb_fg", "samples", "weights", "z_variance"}
            if self.wants_normals:
                fields |= {"comp_normal", "normals", "t_dirs"}
            return frozenset(fields | ({"deformation"} if self.geometry.has_deformation else set()))

        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            return self.renderer.samples_with_graph(rays, occupied, budget)

        def check_scene(self, *, dynamic: bool) -> None:
            encoding: Any = getattr(self.geometry, "pos_encoding_config", None)
            if hasattr(encoding, "time_encoding_config") and encoding.static == dynamic:
                ours, theirs = str(dynamic).lower(), str(not dynamic).lower()
                raise ConfigError(
                    f"system.geometry.pos_encoding_config.static={ours} disagrees with "
                    f"data.single_view.static={theirs}; set "
                    f"system.geometry.pos_encoding_config.static={theirs}"
                )
            if (
                dynamic
                and isinstance(encoding, HashGrid.Config)
                and not isinstance(encoding, OverTime.Config)
            ):
                raise ConfigError(
                    "system.geometry.pos_encoding_config.otype: this encoding has no time, so nothing can "
                    "move; use HashGridSpatialTime or HashGridSpatialTimeDeform"
                )
            outer, renderer, radius = "renderer", self.renderer, getattr(self.geometry, "radius", None)
            if hasattr(renderer, "base_renderer"):
                outer, renderer = "renderer.base_renderer", renderer.base_renderer
            marched = getattr(renderer, "radius", radius)
            if radius is not None and marched != radius:
                raise ConfigError(
                    f"system.{outer}.radius={marched:g} disagrees with system.geometry.radius={radius:g}, "
                    f"and rays are marched through the scene's cube; set system.{outer}.radius={radius:g}"
                )

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.geometry: Geometry = cfg.geometry.build()
        self.material: Material = cfg.material.build()
        self.background: Background = cfg.background.build()
        self.renderer: Renderer = cfg.renderer.build(Parts(self.geometry, self.material, self.background))

    def render(self, cameras: Cameras, context: StepContext, budget: Budget = "image") -> RenderOutput:
        return self.renderer(cast_rays(cameras), context, budget)

    def halves(self) -> dict[str, list[nn.Parameter]]:
        dynamic = list(self.geometry.dynamic_parameters())
        moving = {id(parameter) for parameter in dynamic}
        return {"static": [p for p in self.parameters() if id(p) not in moving], "dynamic": dynamic}

    def bound_memory(self, available: float) -> None:
        self.renderer.bound_memory(available)

    def halve_chunks(self, budget: Budget | None) -> dict[str, int]:
        section = "renderer.base_renderer" if hasattr(self.cfg.renderer, "base_renderer") else "renderer"
        return {f"{section}.{key}": value for key, value in self.renderer.halve_chunks(budget).items()}

    def before_step(self, context: StepContext, *, dynamic: bool) -> None:
        self.renderer.update_occupancy(context, dynamic=dynamic)

    # -- as a volume ----------------------------------------------------------------------------

    @property
    def radius(self) -> float:
        return self.geometry.radius

    @property
    def isosurface(self) -> IsosurfaceConfig:
        return self.geometry.cfg

    def density(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], *, step: int
    ) -> Float[Tensor, "N"]:
        return self.geometry.density(positions, times, step=step)

    def radiance(
        self,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        directions: Float[Tensor, "N 3"],
        *,
        step: int,
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N 3"]]:
        field = self.geometry(positions, times, step=step, want_normals=self.material.requires_normal)
        eyes = positions - directions
        points = ShadingPoints(positions=positions, directions=directions, light_positions=eyes)
        return field.sigmas, self.material(field, points, StepContext(step))

    def displacement(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], *, step: int
    ) -> Float[Tensor, "N 3"] | None:
        moved = self.geometry(positions, times, step=step).deformation
        return None if moved is None else 2 * self.radius * moved  # the cube of side 1, in scene units
