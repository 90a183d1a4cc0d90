"""The sums and norms on CUDA, as Triton kernels for pixels in channels-last order.

B images, N = H*W pixels, C channels in G groups of D, S splits of an image's pixels. Triton's tiles have
powers of two as sizes, so channels are padded: CP, DP. A tile is [P, CP]: P pixels with all their channels.

Each pass over an image is shared by S programs, whose sums [B, S, 2, C] a small kernel adds up in a fixed
order, so results are reproducible. Only the sum (or x, where it is the sum but for the bias) and two numbers
of each group are kept for the backward pass.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

TILE = 2048
"""Numbers of a [P, CP] tile: 16 for each of a program's 128 threads."""
PROGRAMS = 4096
"""Wanted of a pass over all images: as many as an H100 runs at once, twice."""
MAX_SPLITS = 512
"""A power of two."""


def add_norm(
    x: Float[Tensor, "B C H W"],
    bias: Float[Tensor, "C"],
    residual: Float[Tensor, "B C H W"] | None,
    scale: Float[Tensor, "C"],
    shift: Float[Tensor, "C"],
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """See ``add_norm`` of the package. Runs on the CPU under ``TRITON_INTERPRET=1``, which is for tests.

    Raises:
        ValueError: float64, or not on CUDA; so in all functions here.
    """
    return _AddNorm.apply(x, bias, residual, scale, shift, groups, eps, silu, True)


def bias_norm(
    x: Float[Tensor, "B C H W"],
    bias: Float[Tensor, "C"],
    scale: Float[Tensor, "C"],
    shift: Float[Tensor, "C"],
    groups: int,
    eps: float,
) -> Float[Tensor, "B C H W"]:
    """See ``bias_norm`` of the package."""
    normed, _ = _AddNorm.apply(x, bias, None, scale, shift, groups, eps, True, False)
    return normed


def add(
    x: Float[Tensor, "B C H W"], bias: Float[Tensor, "C"], residual: Float[Tensor, "B C H W"] | None
) -> Float[Tensor, "B C H W"]:
    """See ``add`` of the package."""
    return _Add.apply(x, bias, residual)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual):
        ctx.adds = residual is not None
        x = _channels_last(x)
        total, _ = _Passes(x).add(x, bias, residual)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None, grad if ctx.adds else None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, scale, shift, groups, eps, silu, writes):
        """Unless it ``writes`` the sum, x is kept instead, and the bias added again."""
        ctx.set_materialize_grads(False)
        x = _channels_last(x)
        passes = _Passes(x, groups, silu)
        total, partial = passes.add(x, bias, residual, writes)
        stats = passes.reduce(_statistics, partial, eps)
        normed = torch.empty_like(x)
        passes.tiles(_normalize, total, bias, stats, scale, shift, normed, ADDS=not writes, **passes.norm)
        ctx.passes, ctx.writes, ctx.adds = passes, writes, residual is not None
        ctx.save_for_backward(total, bias, stats, scale, shift)
        return normed, total if writes else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_normed, grad_total):
        if grad_normed is None:
            return grad_total, None, grad_total if ctx.adds else None, *[None] * 6
        total, bias, stats, scale, shift = ctx.saved_tensors
        passes, adds = ctx.passes, not ctx.writes
        grad_normed = _channels_last(grad_normed)
        inputs = total, bias, stats, scale, shift, grad_normed
        partial = passes.partial()
        passes.run(_grad_moments, *inputs, partial, ADDS=adds, **passes.norm)
        means = passes.reduce(_grad_means, partial)
        grad_x = torch.empty_like(total)
        passes.tiles(
            _grad_input, *inputs, means, grad_x if grad_total is None else _channels_last(grad_total), grad_x,
            ADDS=adds, JOINS=grad_total is not None, **passes.norm,
        )  # fmt: skip
        return grad_x, None, grad_x if ctx.adds else None, *[None] * 6


class _Passes:
    """Launches over the pixels of tensors of one shape."""

    def __init__(self, x: Tensor, groups: int = 1, silu: bool = False) -> None:
        interpreted = not isinstance(_add_moments, triton.JITFunction)
        if x.dtype == torch.float64 or not (x.is_cuda or interpreted):
            raise ValueError(
                f"the triton back end computes up to 32 bits on CUDA, not {x.dtype} on {x.device}; "
                f"use backend=auto"
            )
        self.device, self.groups = x.device, groups
        self.images, self.channels, height, width = x.shape
        self.pixels = height * width
        padded = triton.next_power_of_2(self.channels)
        per_tile = max(1, TILE // padded)
        self.n_tiles = triton.cdiv(self.pixels, per_tile)
        splits = min(MAX_SPLITS, max(1, PROGRAMS // self.images), self.n_tiles)
        self.tiles_of_split = triton.cdiv(self.n_tiles, splits)
        self.splits = triton.cdiv(self.n_tiles, self.tiles_of_split)
        self.tile = {"C": self.channels, "CP": padded, "P": per_tile}
        self.norm = {"D": self.channels // groups, "SILU": silu}

    def add(
        self, x: Tensor, bias: Tensor, residual: Tensor | None, writes: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(the sum, or x unless ``writes``; moments of the sum's parts)."""
        total, partial = torch.empty_like(x) if writes else x, self.partial()
        other = x if residual is None else _channels_last(residual)
        self.run(_add_moments, x, bias, other, total, partial, ADDS=residual is not None, WRITES=writes)
        return total, partial

    def partial(self) -> Tensor:
        return torch.empty(self.images, self.splits, 2, self.channels, device=self.device)

    def run(self, kernel, *tensors: Tensor, **constants: int) -> None:
        """A pass whose programs take ``tiles_of_split`` tiles each."""
        programs, numbers = (self.splits, self.images), (self.pixels, self.tiles_of_split)
        self._launch(kernel, programs, *tensors, *numbers, **self.tile, **constants)

    def tiles(self, kernel, *tensors: Tensor, **constants: int) -> None:
        """A pass whose programs take one tile each."""
        self._launch(kernel, (self.n_tiles, self.images), *tensors, self.pixels, **self.tile, **constants)

    def reduce(self, kernel, partial: Tensor, *numbers: float) -> Tensor:
        """[B, G, 2] from the sums of all splits."""
        result = torch.empty(self.images, self.groups, 2, device=self.device)
        self._launch(
            kernel, (self.groups, self.images), partial, result, self.pixels, self.splits,
            self.tiles_of_split * self.tile["P"], *numbers, C=self.channels,
            D=self.norm["D"], DP=triton.next_power_of_2(self.norm["D"]), SP=MAX_SPLITS,
        )  # fmt: skip
        return result

    def _launch(self, kernel, grid, *arguments, **constants) -> None:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: Triton compiles a function, not a checking wrapper around it.


@triton.jit(do_not_specialize=["n_tiles"])
@no_type_check
def _add_moments(
    x, bias, residual, total, partial, n_pixels, n_tiles,
    C: tl.constexpr, CP: tl.constexpr, P: tl.constexpr, ADDS: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Write x + bias + residual; mean and sum of squared deviations of a split's pixels, by channel."""
    split, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    start = split * n_tiles * P
    # Deviations are counted from the first pixel, lest a large mean swallow them.
    first = (image * n_pixels + start) * C + c
    origin = tl.load(x + first, mask=c < C, other=0.0).to(tl.float32) + b
    if ADDS:
        origin += tl.load(residual + first, mask=c < C, other=0.0).to(tl.float32)
    sums = tl.zeros((P, CP), tl.float32)
    squares = tl.zeros((P, CP), tl.float32)
    for tile in range(n_tiles):
        at, mask = _tile(image, start + tile * P, n_pixels, C, CP, P)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b[None, :]
        if ADDS:
            values += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        if WRITES:
            rounded = values.to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=mask)
            values = rounded.to(tl.float32)
        values = tl.where(mask, values - origin[None, :], 0.0)
        sums += values
        squares += values * values
    count = tl.minimum(n_tiles * P, n_pixels - start).to(tl.float32)
    mean = tl.sum(sums, axis=0) / count
    deviations = tl.sum(squares, axis=0) - mean * mean * count
    row = partial + (image * tl.num_programs(0) + split) * 2 * C + c
    tl.store(row, mean + origin, mask=c < C)
    tl.store(row + C, deviations, mask=c < C)


@triton.jit(do_not_specialize=["splits", "split_pixels"])
@no_type_check
def _statistics(
    partial, stats, n_pixels, splits, split_pixels, eps,
    C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """A group's mean and 1 / standard deviation, of those of its parts (Chan et al. 1979)."""
    group, image = tl.program_id(0), tl.program_id(1)
    at, mask = _parts(group, image, splits, C, D, DP, SP)
    s = tl.arange(0, SP)
    counts = tl.minimum(split_pixels, n_pixels - s * split_pixels).to(tl.float32)[:, None]
    means = tl.load(partial + at, mask=mask, other=0.0)
    deviations = tl.load(partial + at + C, mask=mask, other=0.0)
    size = n_pixels * 1.0 * D  # one pixel is a constant, and no tensor
    mean = tl.sum(tl.where(mask, means * (counts / size), 0.0))
    apart = tl.where(mask, (means - mean) * (means - mean) * counts, 0.0)
    variance = tl.sum(deviations + apart) / size
    row = stats + (image * tl.num_programs(0) + group) * 2
    tl.store(row, mean)
    tl.store(row + 1, 1 / tl.sqrt(tl.maximum(variance, 0.0) + eps))


@triton.jit
@no_type_check
def _normalize(
    total, bias, stats, scale, shift, normed, n_pixels,
    C: tl.constexpr, CP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, SILU: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    at, mask = _tile(image, tl.program_id(0) * P, n_pixels, C, CP, P)
    unit, _, factors, offsets = _unit(total, bias, stats, scale, shift, image, at, mask, C, CP, D, ADDS)
    values = unit * factors[None, :] + offsets[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(normed + at, values.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tiles"])
@no_type_check
def _grad_moments(
    total, bias, stats, scale, shift, grad_normed, partial, n_pixels, n_tiles,
    C: tl.constexpr, CP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, SILU: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    """Sums of a split's gradients before scale and shift, and of their products with the normed values."""
    split, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)
    sums = tl.zeros((P, CP), tl.float32)
    products = tl.zeros((P, CP), tl.float32)
    for tile in range(n_tiles):
        at, mask = _tile(image, (split * n_tiles + tile) * P, n_pixels, C, CP, P)
        unit, _, factors, offsets = _unit(total, bias, stats, scale, shift, image, at, mask, C, CP, D, ADDS)
        grads = _grad_unit(grad_normed, at, mask, unit, factors, offsets, SILU)
        sums += grads
        products += grads * unit
    row = partial + (image * tl.num_programs(0) + split) * 2 * C + c
    tl.store(row, tl.sum(sums, axis=0), mask=c < C)
    tl.store(row + C, tl.sum(products, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["splits", "split_pixels"])
@no_type_check
def _grad_means(
    partial, means, n_pixels, splits, split_pixels,
    C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    group, image = tl.program_id(0), tl.program_id(1)
    at, mask = _parts(group, image, splits, C, D, DP, SP)
    size = n_pixels * 1.0 * D  # one pixel is a constant, and no tensor
    row = means + (image * tl.num_programs(0) + group) * 2
    tl.store(row, tl.sum(tl.load(partial + at, mask=mask, other=0.0)) / size)
    tl.store(row + 1, tl.sum(tl.load(partial + at + C, mask=mask, other=0.0)) / size)


@triton.jit
@no_type_check
def _grad_input(
    total, bias, stats, scale, shift, grad_normed, means, grad_total, grad_x, n_pixels,
    C: tl.constexpr, CP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, SILU: tl.constexpr,
    ADDS: tl.constexpr, JOINS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    at, mask = _tile(image, tl.program_id(0) * P, n_pixels, C, CP, P)
    unit, rstd, factors, offsets = _unit(total, bias, stats, scale, shift, image, at, mask, C, CP, D, ADDS)
    grads = _grad_unit(grad_normed, at, mask, unit, factors, offsets, SILU)
    c = tl.arange(0, CP)
    pair = means + (image * (C // D) + c // D) * 2
    mean = tl.load(pair, mask=c < C, other=0.0)
    slope = tl.load(pair + 1, mask=c < C, other=0.0)
    grads = (grads - mean[None, :] - unit * slope[None, :]) * rstd[None, :]
    if JOINS:
        grads += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + at, grads.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _tile(image, start, n_pixels, C: tl.constexpr, CP: tl.constexpr, P: tl.constexpr):
    """Where the numbers of P pixels are [P, CP], and which of them exist."""
    p = start + tl.arange(0, P)
    c = tl.arange(0, CP)
    return (image * n_pixels + p)[:, None] * C + c[None, :], (p < n_pixels)[:, None] & (c < C)[None, :]


@triton.jit
@no_type_check
def _parts(group, image, splits, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr):
    """Where a group's first sums of all splits are [SP, DP], and which of them exist."""
    s = tl.arange(0, SP)
    d = tl.arange(0, DP)
    at = (image * splits + s)[:, None] * (2 * C) + group * D + d[None, :]
    return at, (s < splits)[:, None] & (d < D)[None, :]


@triton.jit
@no_type_check
def _unit(
    total, bias, stats, scale, shift, image, at, mask,
    C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """A tile with mean 0 and variance 1 [P, CP]; 1 / standard deviation, scale and shift by channel [CP]."""
    c = tl.arange(0, CP)
    pair = stats + (image * (C // D) + c // D) * 2
    mean = tl.load(pair, mask=c < C, other=0.0)
    rstd = tl.load(pair + 1, mask=c < C, other=0.0)
    if ADDS:
        mean -= tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    values = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    factors = tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)
    offsets = tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)
    return (values - mean[None, :]) * rstd[None, :], rstd, factors, offsets


@triton.jit
@no_type_check
def _grad_unit(grad_normed, at, mask, unit, factors, offsets, SILU: tl.constexpr):
    grads = tl.load(grad_normed + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        values = unit * factors[None, :] + offsets[None, :]
        sigmoid = tl.sigmoid(values)
        grads *= sigmoid * (1 + values * (1 - sigmoid))
    return grads * factors[None, :]
