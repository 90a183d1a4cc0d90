"""Compositing on CUDA, as Triton kernels; float32, with sums in float64.

R rays, N samples over all rays (packed, sorted by ray), C channels, padded to CP. A program has B rays and
goes through them W samples at a time, forward from near to far and backward from far to near. Only the inputs
are kept for the backward pass, and nothing is added atomically.

With x = sigma dt, the transmittance T_i = exp(-sum of x_j for j < i) and g_i the gradient of w_i, where
w_i = T_i - T_{i+1}, the gradient of x_i is g_i T_{i+1} - sum of g_j w_j for j > i.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from fourdfy.ops.compositing.composite import Composite
from fourdfy.types import Samples

RAYS = 16
SAMPLES = 16


def composite(
    sigmas: Float[Tensor, "N"], values: Float[Tensor, "N C"], samples: Samples, n_rays: int
) -> Composite:
    """See ``ops.compositing``. Runs on the CPU under ``TRITON_INTERPRET=1``, which is for tests."""
    rays = torch.arange(n_rays, device=sigmas.device)
    ends = torch.searchsorted(samples.ray_indices, rays, right=True)
    t_starts, t_ends = samples.t_starts.contiguous(), samples.t_ends.contiguous()
    weights, sums = _Composite.apply(sigmas.contiguous(), values.contiguous(), t_starts, t_ends, ends)
    opacity, depth, z_variance, accumulated = sums.split([1, 1, 1, values.shape[1]], dim=1)
    return Composite(weights=weights, opacity=opacity, depth=depth, z_variance=z_variance, values=accumulated)


class _Composite(torch.autograd.Function):
    """Weights, and sums [R, 3 + C]: opacity, depth, variance, values."""

    @staticmethod
    def forward(ctx, sigmas, values, t_starts, t_ends, ends):
        weights = torch.empty_like(sigmas)
        sums = sigmas.new_empty(len(ends), 3 + values.shape[1])
        totals = torch.empty_like(ends, dtype=torch.float64)
        inputs = sigmas, values, t_starts, t_ends
        _launch(_accumulate, ends, values.shape[1], *inputs, weights, sums, totals)
        ctx.save_for_backward(sigmas, values, t_starts, t_ends, ends, sums, totals)
        ctx.set_materialize_grads(False)
        return weights, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights, grad_sums):
        sigmas, values, t_starts, t_ends, ends, sums, totals = ctx.saved_tensors
        grad_sigmas, grad_values = torch.empty_like(sigmas), torch.empty_like(values)
        of_weights, of_sums = grad_weights is not None, grad_sums is not None
        _launch(
            _differentiate,
            ends,
            values.shape[1],
            *(sigmas, values, t_starts, t_ends, sums, totals),
            grad_weights.contiguous() if of_weights else sigmas,
            grad_sums.contiguous() if of_sums else sums,
            *(grad_sigmas, grad_values),
            OF_WEIGHTS=of_weights,
            OF_SUMS=of_sums,
        )
        return grad_sigmas, grad_values, None, None, None


def _launch(kernel, ends: Int[Tensor, "R"], channels: int, *arguments: Tensor, **flags: bool) -> None:
    if len(ends):
        sizes = {"C": channels, "CP": triton.next_power_of_2(channels), "B": RAYS, "W": SAMPLES}
        with torch.cuda.device_of(ends):
            kernel[(triton.cdiv(len(ends), RAYS),)](ends, *arguments, len(ends), **sizes, **flags)


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: Triton compiles a function, not a checking wrapper around it.


@triton.jit(do_not_specialize=["n_rays"])
@no_type_check
def _accumulate(
    ends,
    sigmas,
    values,
    t_starts,
    t_ends,
    weights,
    sums,
    totals,
    n_rays,
    C: tl.constexpr,
    CP: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
):
    ray, exists, begin, end = _rays_of_program(ends, n_rays, B)
    channels = tl.arange(0, CP)[None, :]
    passed = tl.zeros((B,), tl.float64)
    opacity, depth, square = (
        tl.zeros((B,), tl.float64),
        tl.zeros((B,), tl.float64),
        tl.zeros((B,), tl.float64),
    )
    accumulated = tl.zeros((B, CP), tl.float32)
    at = begin
    while tl.max((at < end).to(tl.int32), axis=0) > 0:
        index = at[:, None] + tl.arange(0, W)[None, :]
        mine = index < end[:, None]
        x, _, t = _interval(sigmas, t_starts, t_ends, index, mine)
        through = passed[:, None] + tl.cumsum(x, axis=1)
        w = tl.exp(x - through) - tl.exp(-through)
        tl.store(weights + index, w.to(tl.float32), mask=mine)
        opacity += tl.sum(w, axis=1)
        depth += tl.sum(w * t, axis=1)
        square += tl.sum(w * t * t, axis=1)
        for channel in tl.static_range(C):
            value = tl.load(values + index * C + channel, mask=mine, other=0.0)
            sum_of_channel = tl.sum(w.to(tl.float32) * value, axis=1)
            accumulated += tl.where(channels == channel, sum_of_channel[:, None], 0.0)
        passed += tl.sum(x, axis=1)
        at += W
    row = sums + ray * (3 + C)
    tl.store(row, opacity.to(tl.float32), mask=exists)
    tl.store(row + 1, depth.to(tl.float32), mask=exists)
    tl.store(row + 2, (square + (opacity - 2.0) * depth * depth).to(tl.float32), mask=exists)
    tl.store(row[:, None] + 3 + channels, accumulated, mask=exists[:, None] & (channels < C))
    tl.store(totals + ray, passed, mask=exists)


@triton.jit(do_not_specialize=["n_rays"])
@no_type_check
def _differentiate(
    ends,
    sigmas,
    values,
    t_starts,
    t_ends,
    sums,
    totals,
    grad_weights,
    grad_sums,
    grad_sigmas,
    grad_values,
    n_rays,
    OF_WEIGHTS: tl.constexpr,
    OF_SUMS: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
):
    ray, exists, begin, end = _rays_of_program(ends, n_rays, B)
    through = tl.load(totals + ray, mask=exists, other=0.0)
    gathered = tl.zeros((B,), tl.float64)
    row = ray * (3 + C)
    opacity = tl.load(sums + row, mask=exists, other=0.0)[:, None]
    depth = tl.load(sums + row + 1, mask=exists, other=0.0)[:, None]
    at = begin + (tl.max(end - begin, axis=0) + W - 1) // W * W - W
    while tl.max((at >= begin).to(tl.int32), axis=0) > 0:
        index = at[:, None] + tl.arange(0, W)[None, :]
        mine = index < end[:, None]
        x, dt, t = _interval(sigmas, t_starts, t_ends, index, mine)
        before = through[:, None] - tl.cumsum(x, axis=1, reverse=True)
        after = tl.exp(-(before + x))
        w = tl.exp(-before) - after
        grad = tl.zeros((B, W), tl.float32)
        if OF_WEIGHTS:
            grad += tl.load(grad_weights + index, mask=mine, other=0.0)
        if OF_SUMS:
            grad += tl.load(grad_sums + row, mask=exists, other=0.0)[:, None]
            grad += tl.load(grad_sums + row + 1, mask=exists, other=0.0)[:, None] * t
            off = t - depth
            of_variance = off * off - 2.0 * t * depth * (1.0 - opacity)
            grad += tl.load(grad_sums + row + 2, mask=exists, other=0.0)[:, None] * of_variance
        for channel in tl.static_range(C):
            of_channel = tl.zeros((B, 1), tl.float32)
            if OF_SUMS:
                of_channel += tl.load(grad_sums + row + 3 + channel, mask=exists, other=0.0)[:, None]
            value = tl.load(values + index * C + channel, mask=mine, other=0.0)
            grad += of_channel * value
            tl.store(grad_values + index * C + channel, w.to(tl.float32) * of_channel, mask=mine)
        weighed = tl.where(mine, grad * w, 0.0)
        later = gathered[:, None] + tl.cumsum(weighed, axis=1, reverse=True) - weighed
        tl.store(grad_sigmas + index, ((grad * after - later) * dt).to(tl.float32), mask=mine)
        through -= tl.sum(x, axis=1)
        gathered += tl.sum(weighed, axis=1)
        at -= W


@triton.jit
@no_type_check
def _rays_of_program(ends, n_rays, B: tl.constexpr):
    """This program's rays, which of them exist, and where their samples begin and end."""
    ray = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    exists = ray < n_rays
    begin = tl.load(ends + ray - 1, mask=exists & (ray > 0), other=0)
    return ray, exists, begin, tl.load(ends + ray, mask=exists, other=0)


@triton.jit
@no_type_check
def _interval(sigmas, t_starts, t_ends, index, mine):
    """Optical depth, length and midpoint of samples."""
    t_start = tl.load(t_starts + index, mask=mine, other=0.0)
    t_end = tl.load(t_ends + index, mask=mine, other=0.0)
    x = tl.load(sigmas + index, mask=mine, other=0.0) * (t_end - t_start)
    # Behind an optical depth of 1000 there is no light, and sums of such numbers keep their digits.
    return tl.where(x > 1000.0, 1000.0, x).to(tl.float64), t_end - t_start, (t_start + t_end) / 2.0
