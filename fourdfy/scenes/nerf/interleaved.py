"""The original's low-memory renderer, as its config files name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fourdfy.config import slot
from fourdfy.registry import register
from fourdfy.scenes.nerf.masked import MaskedVolumeRenderer, Quotas
from fourdfy.scenes.nerf.renderer_base import Parts, Renderer
from fourdfy.types import Budget, RayBundle, RenderOutput

STRIDE = 3


@register("stable-nerf-volume-renderer")
class InterleavedVolumeRenderer(Renderer):
    """The masked renderer, whose budget the 3 x 3 interleaved sub-images of a frame share.

    That matters with ``gradient: subset`` alone. Exact gradients need no sub-images.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Renderer.Config):
        base_renderer_type: str = "mask-nerf-volume-renderer"
        base_renderer: Any = slot(MaskedVolumeRenderer, "base_renderer_type")

        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            return self.base_renderer.samples_with_graph(rays, occupied, budget)

        @property
        def wants_normals(self) -> bool:
            return self.base_renderer.wants_normals

    cfg: Config

    def __init__(self, cfg: Config, scene: Parts) -> None:
        super().__init__(cfg, scene)
        self.base_renderer: MaskedVolumeRenderer = cfg.base_renderer.build(scene)

    def forward(
        self,
        rays: RayBundle,
        *,
        step: int,
        generator: torch.Generator | None = None,
        sample_budget: Budget = "video",
    ) -> RenderOutput:
        return self.base_renderer(
            rays, step=step, generator=generator, sample_budget=sample_budget, share_out=interleaved
        )

    def update_occupancy(self, *, step: int, dynamic: bool, generator: torch.Generator) -> None:
        self.base_renderer.update_occupancy(step=step, dynamic=dynamic, generator=generator)


def interleaved(rays: RayBundle, budget: int) -> Quotas:
    """The original's shares: it rendered the frames of one time, B cameras, in one call for each of the nine
    sub-images (pixels ``[i::3, j::3]``), and each call had ``budget // (9 B)`` samples with gradient."""
    _, moment, num_cameras = rays.times.unique(return_inverse=True, return_counts=True)
    height, width = rays.directions.shape[1:3]
    row, column = (torch.arange(size, device=moment.device) % STRIDE for size in (height, width))
    sub_image = STRIDE * row[:, None] + column
    return Quotas(
        groups=(STRIDE**2 * moment[:, None, None] + sub_image).flatten(),
        sizes=(budget // (STRIDE**2 * num_cameras)).repeat_interleave(STRIDE**2),
    )
