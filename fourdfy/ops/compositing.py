"""Volume compositing along rays (Max 1995; Mildenhall et al. 2020, eq. 3).

R rays, N samples over all rays (packed, sorted by ray), C channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def alphas_from_density(
    sigmas: Float[Tensor, "N"], t_starts: Float[Tensor, "N"], t_ends: Float[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """The share of light that an interval stops: ``1 - exp(-sigma (t_end - t_start))``."""
    return -torch.expm1(-sigmas * (t_ends - t_starts))


def transmittance_from_density(
    sigmas: Float[Tensor, "N"],
    t_starts: Float[Tensor, "N"],
    t_ends: Float[Tensor, "N"],
    ray_indices: Int[Tensor, "N"],
) -> Float[Tensor, "N"]:
    """The share of light that reaches an interval's start: ``exp(-sum of sigma dt before it)``.

    Carries gradients to ``sigmas``, ``t_starts`` and ``t_ends``.
    """
    # One running sum over all rays, minus its value where the ray begins. It grows with the whole
    # scene, and a difference of large float32 numbers would have no digits left; in float64 the
    # rounding stays below 1e-9 for any total up to 1e6.
    depths = (sigmas * (t_ends - t_starts)).double()
    before = depths.cumsum(0) - depths
    return torch.exp(before[_first_of_ray(ray_indices)] - before).to(sigmas.dtype)


def weights_from_density(
    sigmas: Float[Tensor, "N"],
    t_starts: Float[Tensor, "N"],
    t_ends: Float[Tensor, "N"],
    ray_indices: Int[Tensor, "N"],
) -> Float[Tensor, "N"]:
    """What each interval adds to its pixel: alpha times transmittance."""
    transmittance = transmittance_from_density(sigmas, t_starts, t_ends, ray_indices)
    return alphas_from_density(sigmas, t_starts, t_ends) * transmittance


def accumulate(
    weights: Float[Tensor, "N"],
    values: Float[Tensor, "N C"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
) -> Float[Tensor, "R C"]:
    """Sum ``w_i v_i`` over the samples of each ray; rays without samples give 0."""
    pixels = values.new_zeros(n_rays, values.shape[-1])
    return pixels.index_add(0, ray_indices, weights[:, None] * values)


def opacity_and_depth(
    weights: Float[Tensor, "N"],
    t_mids: Float[Tensor, "N"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    """``(sum w, sum w t)``; the depth is not divided by the opacity. Scene units."""
    values = torch.stack([torch.ones_like(t_mids), t_mids], dim=-1)
    opacity, depth = accumulate(weights, values, ray_indices, n_rays).split(1, dim=-1)
    return opacity, depth


def z_variance(
    weights: Float[Tensor, "N"],
    t_mids: Float[Tensor, "N"],
    depth: Float[Tensor, "R 1"],
    ray_indices: Int[Tensor, "N"],
) -> Float[Tensor, "R 1"]:
    """``sum w (t - depth)^2``: how thick the surface looks. Scene units squared."""
    offsets = t_mids[:, None] - depth[ray_indices]
    return accumulate(weights, offsets.square(), ray_indices, len(depth))


def _first_of_ray(ray_indices: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """For each sample, the position of its ray's first sample."""
    positions = torch.arange(len(ray_indices), device=ray_indices.device)
    begins = ray_indices != ray_indices.roll(1)  # position 0 counts as a begin either way
    return torch.where(begins, positions, 0).cummax(0).values
