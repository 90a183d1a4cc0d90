"""``gradient: subset``, for comparison: the original's random choice of the samples that carry gradients.

R rays, N samples over all rays (packed, sorted by ray), G groups of samples that share a quota.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fourdfy.types import RayBundle, Samples

STRIDE = 3


@dataclass(frozen=True)
class Quotas:
    """How many samples may carry a gradient."""

    groups: Int[Tensor, "R"]
    """Which group a ray's samples belong to."""
    sizes: Int[Tensor, "G"]
    """Samples with gradient, in each group."""


def whole_call(rays: RayBundle, cap: int) -> Quotas:
    """One cap for all rays."""
    every_ray = rays.directions[..., 0].flatten()
    return Quotas(
        groups=torch.zeros_like(every_ray, dtype=torch.long),
        sizes=torch.full((1,), cap, device=every_ray.device),
    )


def interleaved(rays: RayBundle, cap: int) -> Quotas:
    """The shares of ``stable-nerf-volume-renderer``: the original rendered the frames of one time, B cameras,
    in one call for each of the nine sub-images (pixels ``[i::3, j::3]``), and each call had ``cap // (9 B)``
    samples with gradient."""
    _, moment, num_cameras = rays.times.unique(return_inverse=True, return_counts=True)
    height, width = rays.directions.shape[1:3]
    row, column = (torch.arange(size, device=moment.device) % STRIDE for size in (height, width))
    sub_image = STRIDE * row[:, None] + column
    return Quotas(
        groups=(STRIDE**2 * moment[:, None, None] + sub_image).flatten(),
        sizes=(cap // (STRIDE**2 * num_cameras)).repeat_interleave(STRIDE**2),
    )


def draw_subset(samples: Samples, quotas: Quotas, generator: torch.Generator) -> Bool[Tensor, "N"]:
    """As many of each group's samples as its quota says, drawn with equal probability."""
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
