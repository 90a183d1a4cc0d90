"""The definition of compositing, in plain torch. Carries gradients of any order, to the distances too.

R rays, N samples over all rays (packed, sorted by ray), C channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from fourdfy.ops.compositing.composite import Composite
from fourdfy.types import Samples


def composite(
    sigmas: Float[Tensor, "N"], values: Float[Tensor, "N C"], samples: Samples, n_rays: int
) -> Composite:
    """See ``ops.compositing``."""
    ray_indices = samples.ray_indices
    weights = weights_from_density(sigmas, samples.t_starts, samples.t_ends, ray_indices, n_rays)
    t_mids = (samples.t_starts + samples.t_ends) / 2
    depth = accumulate(weights, t_mids[:, None], ray_indices, n_rays)
    offsets = t_mids - depth[:, 0].index_select(0, ray_indices)
    return Composite(
        weights=weights,
        opacity=_sum_per_ray(weights, ray_indices, n_rays)[:, None],
        depth=depth,
        z_variance=accumulate(weights, offsets.square()[:, None], ray_indices, n_rays),
        values=accumulate(weights, values, ray_indices, n_rays),
    )


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
