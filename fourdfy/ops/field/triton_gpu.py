"""The space-time field on CUDA, as Triton kernels; float32, two features per level.

N points, L levels, F = 2 features of a level, 8 corners of a cell in space, E entries of a hashed level,
B points of a program.

Reading tables and adding to them takes nearly all of the time, and is bound by the number of accesses, so
that is what this file saves. A hashed entry over space and time is ``hash(space) ^ hash(time)``, so at a
fixed time a level of the space-time grid is a grid over space: a slice, whose entry e is interpolated
from two entries that flipping bits of e leads to. Where the level of the grid over space is hashed too, both
have the same cells and entries, and are added: a point reads 8 entries instead of 24. The backward pass adds
to slices first, and from them to the tables. The points of a step have few times, in runs of equal ones,
which are found on the device; points of too many times read the tables themselves.

Features are stored level by level, [L, N, F], so that neighbouring points' are written together. In the
backward pass their gradient takes their place, so a point needs 128 bytes for 16 levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, no_type_check

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from triton import language as tl

from fourdfy.ops.hash_grid.spec import PRIMES, HashGridSpec, over_time
from fourdfy.ops.hash_grid.triton_gpu import COPIES, RUN, combine, copies_of_coarse_levels, wrap
from fourdfy.ops.mlp import triton_gpu as mlp

SLICES = 16
"""Times that have slices, at most."""
LEVELS_AT_ONCE = 2
"""Levels whose slices exist at the same time; 64 MiB each for 2^19 entries."""
MIN_POINTS = 1 << 17
"""Fewer points never pay for slices."""
POINTS_PER_ENTRY = 1 / 16
"""Slices are made if there are at least so many points for each entry of a level's slices."""
TILE = 2048
"""Numbers of a [B, 8, F] tile."""


def forward(
    x: Float[Tensor, "N 3"],
    times: Float[Tensor, "N"],
    space: Float[Tensor, "P"],
    space_time: Float[Tensor, "Q"],
    spec: HashGridSpec,
    hidden: Float[Tensor, "H C"],
    output: Float[Tensor, "K H"],
    slices: bool | None = None,
) -> Float[Tensor, "N K"]:
    """See ``field``. Runs on the CPU under ``TRITON_INTERPRET=1``, which is for tests.

    Raises:
        ValueError: not float32 on CUDA, or not two features per level.
    """
    if x.dtype != torch.float32 or not (x.is_cuda or _is_interpreted()):
        raise ValueError(
            f"the triton back end computes float32 on CUDA, not {x.dtype} on {x.device}; use backend=auto"
        )
    if spec.n_features_per_level != 2:
        raise ValueError(f"n_features_per_level={spec.n_features_per_level}: the field's kernels expect 2")
    tensors = (tensor.contiguous() for tensor in (x, times, space, space_time, hidden, output))
    return _Field.apply(*tensors, spec, slices)


class _Field(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, times, space, space_time, hidden, output, spec, slices):
        ctx.save_for_backward(x, times, space, space_time, hidden, output)
        ctx.spec, ctx.slices = spec, slices
        ctx.features = _encode(_Points.of(x, times, spec, slices), space, space_time, spec)
        return mlp.outputs_of(ctx.features, hidden, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_outputs):
        x, times, space, space_time, hidden, output = ctx.saved_tensors
        _, _, wants_space, wants_time, *wants_weights, _, _ = ctx.needs_input_grad
        points = _Points.of(x, times, ctx.spec, ctx.slices)
        grad_outputs = grad_outputs.contiguous()
        features, ctx.features = ctx.features, None
        if features is None:  # a second backward pass through the same graph
            features = _encode(points, space, space_time, ctx.spec)
        grad_hidden = grad_output = grad_space = grad_time = None
        if any(wants_weights):
            grad_hidden, grad_output = mlp.weight_gradients(features, hidden, output, grad_outputs)
        if wants_space or wants_time:
            grads = mlp.input_gradient(features, hidden, output, grad_outputs, into=features)
            grad_space = torch.zeros_like(space) if wants_space else None
            grad_time = torch.zeros_like(space_time) if wants_time else None
            _add_gradients(points, grads, grad_space, grad_time, ctx.spec)
        return None, None, grad_space, grad_time, grad_hidden, grad_output, None, None


@dataclass(frozen=True)
class _Points:
    """Points, and which of them have the same time."""

    x: Float[Tensor, "N 3"]
    times: Float[Tensor, "N"]
    runs: Int[Tensor, "N"] | None
    """Number of the run of equal times that a point belongs to; None: no slices."""
    moments: Float[Tensor, "S"]
    """The time of each run."""
    n_slices: Int[Tensor, "1"]
    """How many runs there are; 0 if slices do not pay."""

    @classmethod
    def of(cls, x: Tensor, times: Tensor, spec: HashGridSpec, slices: bool | None) -> _Points:
        moments, entries = times.new_zeros(SLICES), 1 << spec.log2_hashmap_size
        if not (len(x) >= MIN_POINTS if slices is None else slices and len(x)):
            return cls(x, times, None, moments, times.new_zeros(1, dtype=torch.int32))
        runs = times.new_zeros(len(times), dtype=torch.int32)
        torch.cumsum(times[1:] != times[:-1], dim=0, dtype=torch.int32, out=runs[1:])
        with torch.cuda.device_of(x):
            _find_moments[triton.cdiv(len(x), 1024),](times, runs, moments, len(x), S=SLICES, B=1024)
        count = runs[-1:] + 1
        pays = count * (POINTS_PER_ENTRY * entries) <= len(x)
        return cls(x, times, runs, moments, count * ((count <= SLICES) & (pays | bool(slices))))


def _encode(points: _Points, space: Tensor, space_time: Tensor, spec: HashGridSpec) -> Float[Tensor, "L N F"]:
    features = points.x.new_empty(spec.n_levels, len(points.x), 2)
    direct, passes = _passes(points, spec)
    _launch(_gather, points, spec, direct, space, space, space_time, features, SLICED=False)
    if passes:
        slices = _empty_slices(space, spec)
    for levels in passes:
        _launch_over_entries(_slice, points, spec, levels, space, space_time, slices, times=SLICES)
        _launch(_gather, points, spec, levels, slices, space, space_time, features, SLICED=True)
    return features


def _add_gradients(
    points: _Points, grads: Tensor, grad_space: Tensor | None, grad_time: Tensor | None, spec: HashGridSpec
) -> None:
    """The gradients of the tables that are not None, added to them."""
    _, passes = _passes(points, spec)
    sliced = bool(passes) and grad_time is not None
    walk: dict[str, Any] = {"R": COPIES, "K": RUN}
    if grad_space is not None:
        with copies_of_coarse_levels(grad_space, spec) as copies:
            to_space = points, spec, range(spec.n_levels), grads, grad_space, *copies
            _launch(_scatter, *to_space, TABLE="space", SLICED=sliced, **walk)
    if grad_time is None:
        return
    with copies_of_coarse_levels(grad_time, over_time(spec)) as copies:
        to_time = points, spec, range(spec.n_levels), grads, grad_time, *copies
        _launch(_scatter, *to_time, sides=2, TABLE="time", SLICED=sliced, **walk)
    if passes:
        slices = _empty_slices(grads, spec)
    for levels in passes:
        _launch_over_entries(_clear, points, spec, levels, slices, times=SLICES)
        to_slices = points, spec, levels, grads, slices, slices, 0, 0
        _launch(_scatter, *to_slices, TABLE="slices", SLICED=True, **walk)
        space = grad_time if grad_space is None else grad_space
        tables = slices, space, grad_time
        _launch_over_entries(_collect, points, spec, levels, *tables, SPACE=grad_space is not None)


def _passes(points: _Points, spec: HashGridSpec) -> tuple[range, list[range]]:
    """Levels without slices, and groups of those whose slices exist together."""
    if points.runs is None:
        return range(spec.n_levels), []
    first = sum(not level.hashed for level in over_time(spec).levels)
    starts = range(first, spec.n_levels, LEVELS_AT_ONCE)
    return range(first), [range(at, min(at + LEVELS_AT_ONCE, spec.n_levels)) for at in starts]


def _empty_slices(like: Tensor, spec: HashGridSpec) -> Float[Tensor, "S G E F"]:
    return like.new_empty(SLICES, LEVELS_AT_ONCE, 1 << spec.log2_hashmap_size, 2)


def _launch(
    kernel, points: _Points, spec: HashGridSpec, levels: range, *arguments, sides: int = 1, **options
) -> None:
    """Run ``kernel`` on a grid of blocks of points, levels and sides of a cell in time."""
    if len(points.x) == 0 or not levels:
        return
    block = TILE // 16
    runs = points.times if points.runs is None else points.runs  # any tensor: not read without slices
    with torch.cuda.device_of(points.x):
        kernel[triton.cdiv(len(points.x), block * options.get("K", 1)), len(levels), sides](
            points.x,
            points.times,
            runs,
            points.n_slices,
            *arguments,
            *_level_table(spec, points.x.device),
            len(points.x),
            levels.start,
            E=1 << spec.log2_hashmap_size,
            G=LEVELS_AT_ONCE,
            B=block,
            **options,
        )


def _launch_over_entries(
    kernel, points: _Points, spec: HashGridSpec, levels: range, *tensors, times: int = 1, **options
) -> None:
    """Run ``kernel`` on a grid of blocks of a hashed level's entries, levels and times."""
    entries = 1 << spec.log2_hashmap_size
    block = min(entries, 1024)
    with torch.cuda.device_of(points.x):
        kernel[entries // block, len(levels), times](
            points.moments,
            points.n_slices,
            *tensors,
            *_level_table(spec, points.x.device),
            levels.start,
            E=entries,
            G=LEVELS_AT_ONCE,
            B=block,
            **options,
        )


def _is_interpreted() -> bool:
    return not isinstance(_gather, triton.JITFunction)


@cache
def _level_table(spec: HashGridSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scales [L]; [L, 2, 7], of both grids: offset, entries E, 2^32 // E, hashed, strides of y, z, time."""

    def row(level):
        dense = [level.resolution**axis % 2**32 for axis in range(4)]
        strides = PRIMES[1:4] if level.hashed else dense[1:]
        return [level.offset, level.entries, 2**32 // level.entries, level.hashed, *strides]

    pairs = zip(spec.levels, over_time(spec).levels, strict=True)
    rows = [[row(level) for level in pair] for pair in pairs]
    scales = torch.tensor([level.scale for level in spec.levels], dtype=torch.float32, device=device)
    return scales, torch.tensor(rows, dtype=torch.int64, device=device)


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: Triton compiles a function, not a checking wrapper around it.


@triton.jit(do_not_specialize=["n_points"])
@no_type_check
def _find_moments(times, runs, moments, n_points, S: tl.constexpr, B: tl.constexpr):
    """The time of the first point of each run."""
    points = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = points < n_points
    run = tl.load(runs + points, mask=inside, other=S)
    before = tl.load(runs + points - 1, mask=inside & (points > 0), other=-1)
    tl.store(moments + run, tl.load(times + points, mask=inside, other=0.0), mask=(run != before) & (run < S))


@triton.jit(do_not_specialize=["n_points", "first"])
@no_type_check
def _gather(
    x,
    times,
    runs,
    n_slices,
    slices,
    space,
    space_time,
    features,
    scales,
    levels,
    n_points,
    first,
    SLICED: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    """The features of one level."""
    level = first + tl.program_id(1)
    points = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = points < n_points
    scale = tl.load(scales + level)
    of_space, of_time = levels + level * 14, levels + level * 14 + 7
    sliced = tl.load(n_slices) > 0 if SLICED else False
    if sliced:
        weights, entries = _corners(x, points, inside, scale, of_time, B)
        slot = tl.load(runs + points, mask=inside, other=0).to(tl.int64) * G + tl.program_id(1)
        sums = _interpolate(slices, slot[:, None] * E + wrap(entries, of_time), weights, inside)
        if tl.load(of_space + 3) == 0:
            weights, entries = _corners(x, points, inside, scale, of_space, B)
            sums += _interpolate(space, tl.load(of_space) + wrap(entries, of_space), weights, inside)
    else:
        weights, entries = _corners(x, points, inside, scale, of_space, B)
        sums = _interpolate(space, tl.load(of_space) + wrap(entries, of_space), weights, inside)
        weights, entries = _corners(x, points, inside, scale, of_time, B)
        moment = tl.load(times + points, mask=inside, other=0.0)
        for side in tl.static_range(2):
            share, offset = _time_side(moment, scale, side, of_time)
            at = tl.load(of_time) + wrap(combine(entries, offset[:, None], of_time), of_time)
            sums += share[:, None] * _interpolate(space_time, at, weights, inside)
    f = tl.arange(0, 2)
    at = (level.to(tl.int64) * n_points + points)[:, None] * 2 + f[None, :]
    tl.store(features + at, sums, mask=inside[:, None] & (f < 2)[None, :])


@triton.jit(do_not_specialize=["n_points", "first", "n_copied", "n_entries"])
@no_type_check
def _scatter(
    x,
    times,
    runs,
    n_slices,
    grads,
    table,
    copies,
    n_copied,
    n_entries,
    scales,
    levels,
    n_points,
    first,
    TABLE: tl.constexpr,
    SLICED: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """The gradient of one level's features, added to a table of one kind.

    A thread walks along K neighbouring points, which are often in the same cell, and adds what they give to a
    corner before it writes.
    """
    level = first + tl.program_id(1)
    scale = tl.load(scales + level)
    of_space, of_time = levels + level * 14, levels + level * 14 + 7
    sliced = tl.load(n_slices) > 0 if SLICED else False
    # What goes through slices is left to them.
    if TABLE == "slices" and not sliced:
        return
    if TABLE == "space" and sliced and tl.load(of_space + 3) != 0:
        return
    if TABLE == "time" and sliced and tl.load(of_time + 3) != 0:
        return
    if level < n_copied:
        table = copies + (tl.program_id(0) % R) * n_entries * 2
    numbers = of_space if TABLE == "space" else of_time
    side = tl.program_id(2)
    f = tl.arange(0, 2)
    start = (tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)) * K
    last = tl.full((B, 8), -1, tl.int64)
    sums = tl.zeros((B, 8, 2), tl.float32)
    for k in range(K):
        points = start + k
        inside = points < n_points
        weights, entries = _corners(x, points, inside, scale, numbers, B)
        if TABLE == "time":
            share, offset = _time_side(tl.load(times + points, mask=inside, other=0.0), scale, side, of_time)
            weights *= share[:, None]
            entries = combine(entries, offset[:, None], of_time)
        if TABLE == "slices":
            slot = tl.load(runs + points, mask=inside, other=0).to(tl.int64) * G + tl.program_id(1)
            at = slot[:, None] * E + wrap(entries, numbers)
        else:
            at = tl.load(numbers) + wrap(entries, numbers)
        source = (level.to(tl.int64) * n_points + points)[:, None] * 2 + f[None, :]
        grad = tl.load(grads + source, mask=inside[:, None] & (f < 2)[None, :], other=0.0)
        added = weights[:, :, None] * grad[:, None, :]
        moved = (at != last) & inside[:, None]
        _add(table, last, sums, moved & (last >= 0))
        sums = tl.where(moved[:, :, None], added, sums + added)
        last = tl.where(moved, at, last)
    _add(table, last, sums, last >= 0)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _slice(
    moments,
    n_slices,
    space,
    space_time,
    slices,
    scales,
    levels,
    first,
    E: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    """A level of the grid over space and time at one time, plus that of the grid over space if hashed too."""
    slot, run = tl.program_id(1), tl.program_id(2)
    if run >= tl.load(n_slices):
        return
    level = first + slot
    scale = tl.load(scales + level)
    of_space, of_time = levels + level * 14, levels + level * 14 + 7
    f = tl.arange(0, 2)[None, :]
    entries = (tl.program_id(0) * B + tl.arange(0, B)).to(tl.uint32)
    values = tl.zeros((B, 2), tl.float32)
    if tl.load(of_space + 3) != 0:
        values += tl.load(space + (tl.load(of_space) + entries.to(tl.int64))[:, None] * 2 + f)
    moment = tl.load(moments + run)
    for side in tl.static_range(2):
        share, offset = _time_side(moment, scale, side, of_time)
        at = tl.load(of_time) + ((entries ^ offset) & (E - 1)).to(tl.int64)
        values += share * tl.load(space_time + at[:, None] * 2 + f)
    at = (run.to(tl.int64) * G + slot) * E + entries.to(tl.int64)
    tl.store(slices + at[:, None] * 2 + f, values)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _clear(
    moments,
    n_slices,
    slices,
    scales,
    levels,
    first,
    E: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    run = tl.program_id(2)
    if run >= tl.load(n_slices):
        return
    start = ((run.to(tl.int64) * G + tl.program_id(1)) * E + tl.program_id(0) * B) * 2
    tl.store(slices + start + tl.arange(0, 2 * B), tl.zeros((2 * B,), tl.float32))


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _collect(
    moments,
    n_slices,
    slices,
    grad_space,
    grad_time,
    scales,
    levels,
    first,
    SPACE: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    """The transpose of ``_slice``: what the slices have received, given to the tables."""
    n = tl.load(n_slices)
    if n == 0:
        return
    slot = tl.program_id(1)
    level = first + slot
    scale = tl.load(scales + level)
    of_space, of_time = levels + level * 14, levels + level * 14 + 7
    f = tl.arange(0, 2)[None, :]
    entries = (tl.program_id(0) * B + tl.arange(0, B)).to(tl.uint32)
    to_space = tl.zeros((B, 2), tl.float32)
    to_time = tl.zeros((B, 2), tl.float32)
    for run in range(n):
        begin = (run * G + slot).to(tl.int64) * E
        moment = tl.load(moments + run)
        if SPACE:
            to_space += tl.load(slices + (begin + entries.to(tl.int64))[:, None] * 2 + f)
        for side in tl.static_range(2):
            share, offset = _time_side(moment, scale, side, of_time)
            at = begin + ((entries ^ offset) & (E - 1)).to(tl.int64)
            to_time += share * tl.load(slices + at[:, None] * 2 + f)
    at = (tl.load(of_time) + entries.to(tl.int64))[:, None] * 2 + f
    tl.store(grad_time + at, to_time)
    if SPACE and tl.load(of_space + 3) != 0:
        tl.store(grad_space + (tl.load(of_space) + entries.to(tl.int64))[:, None] * 2 + f, to_space)


@triton.jit
@no_type_check
def _corners(x, points, inside, scale, numbers, B: tl.constexpr):
    """Weights and 32-bit indices [B, 8] of a cell's corners in space; ``wrap`` makes entries of them.

    Bit d of a corner's number says which side of axis d it is on.
    """
    corners = tl.arange(0, 8)[None, :]
    weights = tl.full((B, 8), 1.0, tl.float32)
    entries = tl.zeros((B, 8), tl.uint32)
    for axis in tl.static_range(3):
        position = tl.fma(tl.load(x + points * 3 + axis, mask=inside, other=0.0), scale, 0.5)
        floor = tl.floor(position)
        fraction = (position - floor)[:, None]
        far = (corners >> axis) & 1
        # uint32: a negative cell wraps.
        step = (floor.to(tl.int32)[:, None] + far).to(tl.uint32)
        if axis > 0:
            step *= tl.load(numbers + 3 + axis).to(tl.uint32)
        entries = combine(entries, step, numbers)
        weights *= tl.where(far == 1, fraction, 1 - fraction)
    return weights, entries


@triton.jit
@no_type_check
def _time_side(moment, scale, side, numbers):
    """Weight and index of the earlier (0) or later (1) side of a cell in time."""
    position = tl.fma(moment, scale, 0.5)
    floor = tl.floor(position)
    share = tl.where(side == 1, position - floor, 1 - (position - floor))
    return share, (floor.to(tl.int32) + side).to(tl.uint32) * tl.load(numbers + 6).to(tl.uint32)


@triton.jit
@no_type_check
def _interpolate(table, entries, weights, inside):
    f = tl.arange(0, 2)[None, None, :]
    values = tl.load(table + entries[:, :, None] * 2 + f, mask=inside[:, None, None], other=0.0)
    return tl.sum(weights[:, :, None] * values, axis=1)


@triton.jit
@no_type_check
def _add(table, entries, values, mask):
    f = tl.arange(0, 2)[None, None, :]
    tl.atomic_add(table + entries[:, :, None] * 2 + f, values, mask=mask[:, :, None] & (f < 2), sem="relaxed")
