"""Volume compositing along rays (Max 1995; Mildenhall et al. 2020, eq. 3).

R rays, N samples over all rays (packed, sorted by ray), C channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad


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
    n_rays: int,
) -> Float[Tensor, "N"]:
    """The share of light that reaches an interval's start: ``exp(-sum of sigma dt before it)``.

    Carries gradients to ``sigmas``, ``t_starts`` and ``t_ends``.
    """
    # One running sum over all rays, minus its value where the ray begins. It grows with the whole
    # scene, and a difference of large float32 numbers would have no digits left; in float64 the
    # rounding stays below 1e-9 for any total up to 1e6.
    before = pad(running_sum((sigmas * (t_ends - t_starts)).double()), (1, 0))
    begins = torch.searchsorted(ray_indices, torch.arange(n_rays, device=ray_indices.device))
    before_ray = before.index_select(0, begins).index_select(0, ray_indices)
    return torch.exp(before_ray - before[:-1]).to(sigmas.dtype)


def weights_from_density(
    sigmas: Float[Tensor, "N"],
    t_starts: Float[Tensor, "N"],
    t_ends: Float[Tensor, "N"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
) -> Float[Tensor, "N"]:
    """The weight of each interval in its pixel: alpha times transmittance."""
    transmittance = transmittance_from_density(sigmas, t_starts, t_ends, ray_indices, n_rays)
    return alphas_from_density(sigmas, t_starts, t_ends) * transmittance


def accumulate(
    weights: Float[Tensor, "N"],
    values: Float[Tensor, "N C"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
) -> Float[Tensor, "R C"]:
    """Sum ``w_i v_i`` over the samples of each ray; rays without samples give 0."""
    # Summing channel by channel is twice as fast on the CPU as summing rows, forward and backward.
    sums = [_sum_per_ray(weights * value, ray_indices, n_rays) for value in values.unbind(-1)]
    return torch.stack(sums, dim=-1)


def opacity_and_depth(
    weights: Float[Tensor, "N"],
    t_mids: Float[Tensor, "N"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    """``(sum w, sum w t)``: the depth is in scene units and not divided by the opacity.

    Losses use this sum, as in threestudio; images and files show ``expected_depth``.
    """
    opacity = _sum_per_ray(weights, ray_indices, n_rays)
    return opacity[:, None], accumulate(weights, t_mids[:, None], ray_indices, n_rays)


def expected_depth(
    opacity: Float[Tensor, "*F H W 1"], depth: Float[Tensor, "*F H W 1"]
) -> Float[Tensor, "*F H W 1"]:
    """``sum w t / sum w``, the mean distance at which light is stopped; 0 where the opacity is 0.5 or less.

    Args:
        opacity, depth: the sums of ``opacity_and_depth``.
    """
    return torch.where(opacity > 0.5, depth / opacity, 0)


def z_variance(
    weights: Float[Tensor, "N"],
    t_mids: Float[Tensor, "N"],
    depth: Float[Tensor, "R 1"],
    ray_indices: Int[Tensor, "N"],
) -> Float[Tensor, "R 1"]:
    """``sum w (t - depth)^2``: how thick the surface looks. Scene units squared."""
    offsets = t_mids - depth[:, 0].index_select(0, ray_indices)
    return accumulate(weights, offsets.square()[:, None], ray_indices, len(depth))


def running_sum(values: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """``values.cumsum(0)``, always in the same order under ``torch.use_deterministic_algorithms``.

    CUDA's own implementation adds in no fixed order and is then refused.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(0)
    # Sums of 1, 2, 4, ... neighbours (Hillis and Steele 1986).
    reach = 1
    while reach < len(values):
        values = values + pad(values[:-reach], (reach, 0))
        reach *= 2
    return values


def _sum_per_ray(
    values: Float[Tensor, "N"], ray_indices: Int[Tensor, "N"], n_rays: int
) -> Float[Tensor, "R"]:
    return values.new_zeros(n_rays).index_add(0, ray_indices, values)
