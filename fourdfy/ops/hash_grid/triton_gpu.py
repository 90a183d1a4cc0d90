"""The hash grid on CUDA, as Triton kernels; float32.

N points, D dimensions, L levels, F features per level, K = L*F, C = 2^D corners of a cell, B points of
a program. Triton's tiles have powers of two as sizes, so features and axes are padded: FP, DP.

A program takes B points of one level, and a cell's corners are a dimension of its [B, C, FP] tile.
Programs start level by level, so that one level's table stays in the second-level cache. Only the inputs
are kept for the backward pass.

Additions to one entry wait for each other. In the parameter gradient, a thread therefore walks along RUN
neighbouring points and adds up what they give to an entry, which is often the same on a ray, before it
writes; and the coarsest levels, in whose few entries all points meet, are added to in COPIES copies.

The parameter gradient is summed by atomic additions, in no fixed order, so its last bits differ
from run to run. The features and the position gradient are reproducible.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import no_type_check

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton import language as tl

from fourdfy.ops.hash_grid import reference
from fourdfy.ops.hash_grid.spec import PRIMES, HashGridSpec

TILE = 2048
"""Numbers of a [B, C, FP] tile: 16 for each of a program's 128 threads."""
RUN, RUN_TILE = 8, 1024
COPIES, COPIED = 32, 1 << 16
"""Levels are copied while they have at most ``COPIED`` entries together."""


def forward(x: Float[Tensor, "N D"], params: Float[Tensor, "P"], spec: HashGridSpec) -> Float[Tensor, "N K"]:
    """See ``hash_grid``. Runs on the CPU under ``TRITON_INTERPRET=1``, which is for tests.

    Raises:
        ValueError: not float32 on CUDA.
        RuntimeError: in the backward pass, a parameter gradient under ``torch.use_deterministic_algorithms``.
    """
    if x.dtype != torch.float32 or not (x.is_cuda or _is_interpreted()):
        raise ValueError(
            f"the triton back end computes float32 on CUDA, not {x.dtype} on {x.device}; use backend=auto"
        )
    return _HashGrid.apply(x.contiguous(), params.contiguous(), spec)


class _HashGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, spec):
        ctx.save_for_backward(x, params)
        ctx.spec = spec
        features = x.new_empty(len(x), spec.n_output_dims)
        _launch(_interpolate, x, spec, spec.n_levels, params, features)
        return features

    @staticmethod
    def backward(ctx, grad_features):
        x, params = ctx.saved_tensors
        wants_x, wants_params, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # create_graph=True: analytic normals that are trained.
            return *reference.gradients(x, params, ctx.spec, grad_features, wants_x, wants_params), None
        grad_features = grad_features.contiguous()
        grad_x = grad_params = None
        if wants_params:
            if torch.are_deterministic_algorithms_enabled():
                raise RuntimeError(
                    "the triton back end of the hash grid sums the parameter gradient in no fixed order; "
                    "use backend=auto or torch where algorithms must be deterministic"
                )
            grad_params = torch.zeros_like(params)
            with copies_of_coarse_levels(grad_params, ctx.spec) as copies:
                _launch(_scatter, x, ctx.spec, ctx.spec.n_levels, grad_features, grad_params, *copies)
        if wants_x:
            grad_x = torch.empty_like(x)
            _launch(_differentiate, x, ctx.spec, 1, params, grad_features, grad_x)
        return grad_x, grad_params, None


def _launch(kernel, x: Tensor, spec: HashGridSpec, n_rows: int, *arguments: Tensor | int) -> None:
    """Run ``kernel`` on a grid of blocks of points times ``n_rows``."""
    if len(x) == 0:
        return
    n_dims, n_features = x.shape[1], spec.n_features_per_level
    padded = triton.next_power_of_2(n_features)
    walk = {"RUN": RUN, "COPIES": COPIES} if kernel is _scatter else {}
    block = max(1, (RUN_TILE if walk else TILE) // (padded << n_dims))
    with torch.cuda.device_of(x):
        kernel[triton.cdiv(len(x), block * walk.get("RUN", 1)), n_rows](
            x,
            *arguments,
            *_level_table(spec, x.device),
            len(x),
            L=spec.n_levels,
            D=n_dims,
            DP=triton.next_power_of_2(n_dims),
            F=n_features,
            FP=padded,
            B=block,
            **walk,
        )


@contextmanager
def copies_of_coarse_levels(grad_params: Tensor, spec: HashGridSpec) -> Iterator[tuple[Tensor, int, int]]:
    """Copies of the coarsest levels' gradient, how many levels and entries these have; added at the end."""
    ends = [0, *(level.offset + level.entries for level in spec.levels)]
    n_levels = sum(end <= COPIED for end in ends) - 1
    n_numbers = ends[n_levels] * spec.n_features_per_level
    copies = grad_params.new_zeros(COPIES, n_numbers)
    yield copies, n_levels, ends[n_levels]
    grad_params[:n_numbers] += copies.sum(dim=0)


def _is_interpreted() -> bool:
    return not isinstance(_interpolate, triton.JITFunction)


@cache
def _level_table(spec: HashGridSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scales [L], and [L, 4 + D]: offset, entries E, 2^32 // E, hashed, stride of each axis."""

    def row(level):
        dense = [level.resolution**axis % 2**32 for axis in range(spec.n_input_dims)]
        strides = PRIMES[: spec.n_input_dims] if level.hashed else dense
        return [level.offset, level.entries, 2**32 // level.entries, level.hashed, *strides]

    scales = torch.tensor([level.scale for level in spec.levels], dtype=torch.float32, device=device)
    return scales, torch.tensor([row(level) for level in spec.levels], dtype=torch.int64, device=device)


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: Triton compiles a function, not a checking wrapper around it.


@triton.jit(do_not_specialize=["n_points"])
@no_type_check
def _interpolate(
    x,
    table,
    features,
    scales,
    levels,
    n_points,
    L: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    B: tl.constexpr,
):
    level = tl.program_id(1)
    points, inside, f, mask = _tile(n_points, F, FP, B)
    weights, entries = _find_corners(x, points, inside, scales, levels, level, -1, D, B)
    at = entries[:, :, None] * F + f[None, None, :]
    values = tl.load(table + at, mask=mask[:, None, :], other=0.0)
    sums = tl.sum(weights[:, :, None] * values, axis=1)
    tl.store(features + points[:, None] * (L * F) + level * F + f[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["n_points", "n_copied", "n_entries"])
@no_type_check
def _scatter(
    x,
    grad_features,
    grad_params,
    copies,
    n_copied,
    n_entries,
    scales,
    levels,
    n_points,
    L: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    B: tl.constexpr,
    RUN: tl.constexpr,
    COPIES: tl.constexpr,
):
    """The parameter gradient, added to ``grad_params`` or a copy of its coarsest levels."""
    level = tl.program_id(1)
    if level < n_copied:
        grad_params = copies + (tl.program_id(0) % COPIES) * n_entries * F
    f = tl.arange(0, FP)[None, None, :]
    start = (tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)) * RUN
    last = tl.full((B, 1 << D), -1, tl.int64)
    sums = tl.zeros((B, 1 << D, FP), tl.float32)
    for k in range(RUN):
        points = start + k
        inside = points < n_points
        weights, entries = _find_corners(x, points, inside, scales, levels, level, -1, D, B)
        source = grad_features + points[:, None, None] * (L * F) + level * F + f
        grads = tl.load(source, mask=inside[:, None, None] & (f < F), other=0.0)
        moved = (entries != last) & inside[:, None]
        written = (moved & (last >= 0))[:, :, None] & (f < F)
        tl.atomic_add(grad_params + last[:, :, None] * F + f, sums, mask=written, sem="relaxed")
        sums = tl.where(moved[:, :, None], 0.0, sums) + weights[:, :, None] * grads
        last = tl.where(moved, entries, last)
    written = (last >= 0)[:, :, None] & (f < F)
    tl.atomic_add(grad_params + last[:, :, None] * F + f, sums, mask=written, sem="relaxed")


@triton.jit(do_not_specialize=["n_points"])
@no_type_check
def _differentiate(
    x,
    table,
    grad_features,
    grad_x,
    scales,
    levels,
    n_points,
    L: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    B: tl.constexpr,
):
    """The position gradient; a program sums all levels, so that nothing is added atomically."""
    points, inside, f, mask = _tile(n_points, F, FP, B)
    axes = tl.arange(0, DP)[None, :]
    slopes = tl.zeros((B, DP), tl.float32)
    for level in range(L):
        _, entries = _find_corners(x, points, inside, scales, levels, level, -1, D, B)
        grads = tl.load(
            grad_features + points[:, None] * (L * F) + level * F + f[None, :], mask=mask, other=0.0
        )
        at = entries[:, :, None] * F + f[None, None, :]
        values = tl.load(table + at, mask=mask[:, None, :], other=0.0)
        values = tl.sum(values * grads[:, None, :], axis=2)
        for axis in tl.static_range(D):
            weights, _ = _find_corners(x, points, inside, scales, levels, level, axis, D, B)
            slope = tl.sum(weights * values, axis=1) * tl.load(scales + level)
            slopes += tl.where(axes == axis, slope[:, None], 0.0)
    tl.store(grad_x + points[:, None] * D + axes, slopes, mask=inside[:, None] & (axes < D))


@triton.jit
@no_type_check
def _tile(n_points, F: tl.constexpr, FP: tl.constexpr, B: tl.constexpr):
    """This program's points [B] and which of them exist; features [FP], and which of both do [B, FP]."""
    points = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = points < n_points
    f = tl.arange(0, FP)
    return points, inside, f, inside[:, None] & (f < F)[None, :]


@triton.jit
@no_type_check
def _find_corners(
    x, points, inside, scales, levels, level, derived: tl.constexpr, D: tl.constexpr, B: tl.constexpr
):
    """Weights and entries [B, C] of the corners; the weights' derivative along axis ``derived`` if not -1.

    Bit d of a corner's number says which side of axis d it is on.
    """
    scale = tl.load(scales + level)
    numbers = levels + level * (4 + D)
    corners = tl.arange(0, 1 << D)[None, :]
    weights = tl.full((B, 1 << D), 1.0, tl.float32)
    entries = tl.zeros((B, 1 << D), tl.uint32)
    for axis in tl.static_range(D):
        stride = tl.load(numbers + 4 + axis).to(tl.uint32)
        far = (corners >> axis) & 1
        # One rounding, so that all back ends choose the same cell for a point on a boundary.
        position = tl.fma(tl.load(x + points * D + axis, mask=inside, other=0.0), scale, 0.5)
        floor = tl.floor(position)
        fraction = (position - floor)[:, None]
        # uint32: a negative cell wraps.
        step = (floor.to(tl.int32)[:, None] + far).to(tl.uint32) * stride
        entries = combine(entries, step, numbers)
        if axis == derived:
            weights *= tl.where(far == 1, 1.0, -1.0)
        else:
            weights *= tl.where(far == 1, fraction, 1 - fraction)
    return weights, tl.load(numbers) + wrap(entries, numbers)


@triton.jit
@no_type_check
def combine(entries, step, numbers):
    """The index of some axes, and of one more; ``numbers`` is a level's row of the table."""
    return tl.where(tl.load(numbers + 3) != 0, entries ^ step, entries + step)


@triton.jit
@no_type_check
def wrap(entries, numbers):
    """Indices modulo the level's entries: a mask if hashed, else by multiplication with the reciprocal."""
    size = tl.load(numbers + 1).to(tl.uint32)
    quotient = tl.umulhi(entries, tl.load(numbers + 2).to(tl.uint32))  # or one less than it is
    rest = entries - quotient * size
    rest = tl.where(rest >= size, rest - size, rest)
    return tl.where(tl.load(numbers + 3) != 0, entries & (size - 1), rest).to(tl.int64)
