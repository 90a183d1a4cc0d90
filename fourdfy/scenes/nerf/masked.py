"""Volume rendering in bounded memory. The name is the original's, whose masks chose the samples with a graph.

R rays, N samples over all rays (packed, sorted by ray), G groups of samples that share a quota.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.ops.recomputation import recomputed
from fourdfy.registry import register
from fourdfy.scenes.nerf.passes import FlatRays, cut, last_samples, split_rays
from fourdfy.scenes.nerf.renderer import NeRFVolumeRenderer, ShadedRays, joined_records
from fourdfy.types import Budget, FieldOutput, RayBundle, RenderOutput, Samples


@dataclass(frozen=True)
class Quotas:
    """How many samples may carry a gradient, with ``gradient: subset``."""

    groups: Int[Tensor, "R"]
    """Which group a ray's samples belong to."""
    sizes: Int[Tensor, "G"]
    """Samples with gradient, in each group."""


def whole_call(rays: RayBundle, budget: int) -> Quotas:
    """One budget for all rays."""
    every_ray = rays.directions[..., 0].flatten()
    return Quotas(
        groups=torch.zeros_like(every_ray, dtype=torch.long),
        sizes=torch.full((1,), budget, device=every_ray.device),
    )


@register("mask-nerf-volume-renderer")
class MaskedVolumeRenderer(NeRFVolumeRenderer):
    """``nerf-volume-renderer`` at a bounded memory.

    With ``gradient: exact`` images and gradients are the same. Rays are shaded in passes that the
    backward pass computes anew, one at a time: one more evaluation of the field, and what is kept
    for the whole image are 20 bytes per sample (44 with normals).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(NeRFVolumeRenderer.Config):
        train_max_nums: int = number(100_000, 1)
        """Samples of a video step that have a graph at once. A ray is never cut in two. Small numbers
        take time: each pass makes and adds a gradient of the whole hash tables."""
        train_max_nums_static: int = number(2_000_000, 1)
        """The same, of all other steps."""
        gradient: Literal["exact", "subset"] = "exact"
        """``subset`` is the original's, for comparison: a random choice of ``train_max_nums`` samples
        carries gradients, not rescaled, and the others none."""

        def cap(self, budget: Budget) -> int:
            return self.train_max_nums if budget == "video" else self.train_max_nums_static

        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            return min(super().samples_with_graph(rays, occupied, budget), float(self.cap(budget)))

    cfg: Config

    def forward(
        self,
        rays: RayBundle,
        *,
        step: int,
        generator: torch.Generator | None = None,
        sample_budget: Budget = "video",
        share_out: Callable[[RayBundle, int], Quotas] = whole_call,
    ) -> RenderOutput:
        """See ``Renderer``. ``share_out`` deals the budget to groups of rays, with ``gradient: subset``."""
        budget = self.cfg.cap(sample_budget)
        if self.cfg.gradient == "exact":
            shade = partial(self._shade_in_passes, budget=budget)
        else:
            shade = partial(self._shade_with_subset, quotas=share_out(rays, budget))
        return self._render(rays, step, generator, shade)

    # -- exact ----------------------------------------------------------------------------------

    def _shade_in_passes(
        self, rays: FlatRays, samples: Samples, step: int, generator: torch.Generator, budget: int
    ) -> list[ShadedRays]:
        if len(samples) <= budget:
            return self._shade_at_once(rays, samples, step, generator)
        parameters = *self.scene.geometry.parameters(), *self.scene.material.parameters()
        return recomputed(
            lambda part: self._shade(*cut(rays, samples, part), step, generator, self._field),
            split_rays(last_samples(samples, len(rays)), budget),
            inputs=(*parameters, *rays.tensors().values()),
        )

    # -- subset ---------------------------------------------------------------------------------

    def _shade_with_subset(
        self, rays: FlatRays, samples: Samples, step: int, generator: torch.Generator, quotas: Quotas
    ) -> list[ShadedRays]:
        carries = draw_subset(samples, quotas, generator)
        return [self._shade(rays, samples, step, generator, partial(self._field_of_subset, carries=carries))]

    def _field_of_subset(
        self,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        step: int,
        carries: Bool[Tensor, "N"],
    ) -> FieldOutput:
        """The field everywhere, with a graph where ``carries`` says so."""
        trained, fixed = carries.nonzero().squeeze(1), (~carries).nonzero().squeeze(1)
        with torch.no_grad():
            without = self._field_in_chunks(
                positions.index_select(0, fixed), times.index_select(0, fixed), step
            )
        field = self._field(positions.index_select(0, trained), times.index_select(0, trained), step)
        both, order = joined_records([field, without]), torch.cat([trained, fixed]).argsort()
        return both.mapped(lambda value: value.index_select(0, order))


def draw_subset(samples: Samples, quotas: Quotas, generator: torch.Generator) -> Bool[Tensor, "N"]:
    """Of each group's samples, as many as its quota says, each equally likely."""
    shuffled = torch.randperm(len(samples), generator=generator, device=generator.device)
    shuffled = shuffled.to(samples.ray_indices.device)
    groups = quotas.groups[samples.ray_indices[shuffled]]
    by_group = groups.argsort(stable=True)
    shuffled, groups = shuffled[by_group], groups[by_group]
    begins = torch.searchsorted(groups, torch.arange(len(quotas.sizes), device=groups.device))
    rank = torch.arange(len(groups), device=groups.device) - begins[groups]
    drawn = torch.zeros_like(shuffled, dtype=torch.bool)
    drawn[shuffled] = rank < quotas.sizes[groups]
    return drawn
