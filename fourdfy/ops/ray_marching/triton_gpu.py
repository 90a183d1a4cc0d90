"""Ray marching on CUDA, as Triton kernels; float32.

R rays, M candidates of a round, P cells per side of the padded grid, B rays of a program. Each lane follows
one ray. Neither sums nor places depend on the order in which programs run.

Products and sums are rounded one by one, as in torch, unless ``fma`` says otherwise.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
from torch import Tensor
from triton import language as tl

from fourdfy.ops.ray_marching import rounds
from fourdfy.ops.ray_marching.rays import Density, SteppedRays
from fourdfy.types import Samples

BLOCK = 32
"""Rays of a program, which is one warp: they go on together until the last one is done."""


def march(stepped: SteppedRays) -> Samples:
    """See ``ops.ray_marching``. Runs on the CPU under ``TRITON_INTERPRET=1``, which is for tests."""
    return rounds.march(TritonWalk(stepped))


def find_visible(stepped: SteppedRays, density: Density, **limits: Any) -> Samples:
    """See ``ops.ray_marching``."""
    return rounds.find_visible(TritonWalk, stepped, density, **limits)


class TritonWalk(rounds.Walk):
    """Rays on their way, on a GPU."""

    def __init__(self, stepped: SteppedRays) -> None:
        super().__init__(stepped)
        self.cells = self.cells.view(torch.uint8)
        rays = stepped.rays
        self.inputs = [
            value.contiguous() for value in (rays.origins, rays.directions, rays.times, stepped.jitter)
        ]

    def count(self, limit, counts):
        self._walk(counts, limit=limit)

    def take(self, ends, total):
        steps = self.totals.new_empty(total)
        positions, times = (self.inputs[0].new_empty(total, width) for width in (3, 1))
        self._walk(ends, steps, positions, times)
        return steps, positions, times

    def prune(self, steps, sigmas, ends, thin, hidden, counts):
        packed = steps, sigmas.contiguous(), self.inputs[3], ends
        state = self.depths, self.next_steps, counts
        self._launch(_prune, *packed, *state, thin, hidden, self.stepped.step_size, PASSED=self.PASSED)

    def collect(self, steps, ends, kept_ends, kept):
        rays, kept_steps, ranks = (steps.new_empty(kept) for _ in range(3))
        self._launch(_collect, steps, ends, kept_ends, self.totals, rays, kept_steps, ranks)
        return rays, kept_steps, ranks

    def _walk(self, numbers: Tensor, *outputs: Tensor, limit: int = 0) -> None:
        """Count into ``numbers``, or take as many as its running sums say into ``outputs``."""
        size, radius = len(self.cells), self.stepped.radius
        shape = radius, (size - 2) / (2 * radius), self.stepped.step_size, self.stepped.most_steps
        unused = (self.totals,) * (3 - len(outputs))
        self._launch(
            _follow, *self.inputs, self.cells, self.next_steps, numbers, *outputs, *unused, *shape, limit,
            P=size, TAKING=bool(outputs),
        )  # fmt: skip

    def _launch(self, kernel, *arguments: Tensor | float | int, **constants: int | bool) -> None:
        n_rays = len(self.stepped)
        with torch.cuda.device_of(self.totals):
            kernel[(triton.cdiv(n_rays, BLOCK),)](
                *arguments, n_rays, B=BLOCK, num_warps=1, enable_fp_fusion=False, **constants
            )


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: Triton compiles a function, not a checking wrapper around it.


@triton.jit(do_not_specialize=["limit", "most_steps", "n_rays"])
@no_type_check
def _follow(
    origins,
    directions,
    times,
    jitter,
    cells,
    next_steps,
    numbers,
    steps,
    positions,
    sample_times,
    radius,
    to_cells,
    step_size,
    most_steps,
    limit,
    n_rays,
    P: tl.constexpr,
    TAKING: tl.constexpr,
    B: tl.constexpr,
):
    """Go from each ray's next step to the end of the box, or to so many candidates."""
    ray, exists = _rays_of_program(n_rays, B)
    u = tl.load(jitter + ray, mask=exists, other=0.0)
    ox, dx, x, slope_x, inverse_x = _axis(origins, directions, ray, exists, 0, radius, to_cells)
    oy, dy, y, slope_y, inverse_y = _axis(origins, directions, ray, exists, 1, radius, to_cells)
    oz, dz, z, slope_z, inverse_z = _axis(origins, directions, ray, exists, 2, radius, to_cells)

    near_x, far_x = _between_faces(x, inverse_x, P)
    near_y, far_y = _between_faces(y, inverse_y, P)
    near_z, far_z = _between_faces(z, inverse_z, P)
    near = tl.maximum(tl.maximum(near_x, near_y), tl.maximum(near_z, 0.0))
    far = tl.minimum(tl.minimum(far_x, far_y), far_z)
    # One more step at either end: the midpoint decides below, not the rounding of the entry.
    per_unit, to_middle = 1.0 / step_size, u + 0.5
    first = tl.minimum(tl.maximum(tl.floor(near * per_unit - to_middle), 0.0), 1e9)
    last = tl.minimum(tl.ceil(far * per_unit - to_middle), first + most_steps)
    step = tl.maximum(tl.load(next_steps + ray, mask=exists, other=0), first.to(tl.int32))

    begin, wanted = tl.zeros((B,), tl.int64), tl.full((B,), 0, tl.int64) + limit
    if TAKING:
        begin, end = _own_part(numbers, ray, exists)
        wanted = end - begin
        time = tl.load(times + ray, mask=exists, other=0.0)
    taken, first_taken = tl.zeros((B,), tl.int64), step
    going = exists & (step <= last) & (taken < wanted)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        k = step.to(tl.float32) + u
        middle = (k + 0.5) * step_size
        cell_x, cell_y, cell_z = (
            _cell(x, slope_x, middle, P),
            _cell(y, slope_y, middle, P),
            _cell(z, slope_z, middle, P),
        )
        index = (cell_x.to(tl.int32) * P + cell_y.to(tl.int32)) * P + cell_z.to(tl.int32)
        full = going & (tl.load(cells + index, mask=going, other=0) != 0)
        if TAKING:
            at = begin + taken
            t = (k * step_size + (k + 1.0) * step_size) / 2.0
            tl.store(steps + at, step, mask=full)
            tl.store(positions + 3 * at, tl.fma(dx, t, ox), mask=full)
            tl.store(positions + 3 * at + 1, tl.fma(dy, t, oy), mask=full)
            tl.store(positions + 3 * at + 2, tl.fma(dz, t, oz), mask=full)
            tl.store(sample_times + at, time, mask=full)
        taken += full.to(tl.int64)
        # The last step before the far side of an empty cell: what lies between is in the same cell.
        leave_x, leave_y = _leaving(cell_x, x, slope_x, inverse_x), _leaving(cell_y, y, slope_y, inverse_y)
        leave = tl.minimum(tl.minimum(leave_x, leave_y), _leaving(cell_z, z, slope_z, inverse_z))
        beyond = tl.minimum(tl.maximum(tl.floor(leave * per_unit - to_middle), 0.0), last + 1.0)
        following = tl.where(full, step + 1, tl.maximum(step + 1, beyond.to(tl.int32)))
        step = tl.where(going, following, step)
        first_taken = tl.where(taken > 0, first_taken, step)
        going = going & (step <= last) & (taken < wanted)
    if TAKING:
        tl.store(next_steps + ray, step, mask=exists)
    else:
        tl.store(next_steps + ray, first_taken, mask=exists)
        tl.store(numbers + ray, taken.to(tl.int32), mask=exists)


@triton.jit(do_not_specialize=["n_rays"])
@no_type_check
def _prune(
    steps,
    sigmas,
    jitter,
    ends,
    depths,
    next_steps,
    counts,
    thin,
    hidden,
    step_size,
    n_rays,
    PASSED: tl.constexpr,
    B: tl.constexpr,
):
    ray, exists = _rays_of_program(n_rays, B)
    at, end = _own_part(ends, ray, exists)
    u = tl.load(jitter + ray, mask=exists, other=0.0)
    before = tl.load(depths + ray, mask=exists, other=0.0)
    thinnest = tl.load(thin)
    kept = tl.zeros((B,), tl.int32)
    while tl.max((at < end).to(tl.int32), axis=0) > 0:
        mine = at < end
        step = tl.load(steps + at, mask=mine, other=0)
        k = step.to(tl.float32) + u
        depth = tl.load(sigmas + at, mask=mine, other=0.0) * ((k + 1.0) * step_size - k * step_size)
        seen = mine & (depth >= thinnest) & (before <= hidden)
        tl.store(steps + at, tl.where(seen, step, -1), mask=mine)
        before += depth.to(tl.float64)
        kept += seen.to(tl.int32)
        at += 1
    tl.store(counts + ray, kept, mask=exists)
    tl.store(depths + ray, before, mask=exists)
    tl.store(next_steps + ray, PASSED, mask=exists & ~(before <= hidden))


@triton.jit(do_not_specialize=["n_rays"])
@no_type_check
def _collect(steps, ends, kept_ends, totals, rays, kept_steps, ranks, n_rays, B: tl.constexpr):
    ray, exists = _rays_of_program(n_rays, B)
    at, end = _own_part(ends, ray, exists)
    to, kept_end = _own_part(kept_ends, ray, exists)
    rank = tl.load(totals + ray, mask=exists, other=0)
    end = tl.where(to < kept_end, end, at)
    while tl.max((at < end).to(tl.int32), axis=0) > 0:
        step = tl.load(steps + at, mask=at < end, other=-1)
        left = step >= 0
        tl.store(rays + to, ray, mask=left)
        tl.store(kept_steps + to, step, mask=left)
        tl.store(ranks + to, rank, mask=left)
        to += left.to(tl.int64)
        rank += left.to(tl.int32)
        at += 1
    tl.store(totals + ray, rank, mask=exists)


@triton.jit
@no_type_check
def _rays_of_program(n_rays, B: tl.constexpr):
    ray = tl.program_id(0) * B + tl.arange(0, B)
    return ray, ray < n_rays


@triton.jit
@no_type_check
def _own_part(ends, ray, exists):
    """Where a ray's entries begin and end in a packed list."""
    begin = tl.load(ends + ray - 1, mask=exists & (ray > 0), other=0)
    return begin, tl.load(ends + ray, mask=exists, other=0)


@triton.jit
@no_type_check
def _axis(origins, directions, ray, exists, axis: tl.constexpr, radius, to_cells):
    """Origin and direction along an axis; the same in padded cells; and the inverse of the latter."""
    origin = tl.load(origins + 3 * ray + axis, mask=exists, other=0.0)
    direction = tl.load(directions + 3 * ray + axis, mask=exists, other=0.0)
    slope = direction * to_cells
    # A ray parallel to a face: +-inf are the right distances, 0 / 0 is not.
    inverse = 1.0 / tl.where(tl.abs(slope) < 1e-30, 1e-30, slope)
    return origin, direction, (origin + radius) * to_cells + 1.0, slope, inverse


@triton.jit
@no_type_check
def _between_faces(x, inverse, P: tl.constexpr):
    """The distances between which a ray is between the box's two faces across an axis."""
    lower, upper = (1.0 - x) * inverse, (P - 1.0 - x) * inverse
    return tl.minimum(lower, upper), tl.maximum(lower, upper)


@triton.jit
@no_type_check
def _cell(x, slope, t, P: tl.constexpr):
    # One rounding, as torch.addcmul on CUDA.
    return tl.floor(tl.minimum(tl.maximum(tl.fma(slope, t, x), 0.0), P - 1.0))


@triton.jit
@no_type_check
def _leaving(cell, x, slope, inverse):
    """The distance at which a ray leaves a cell along an axis."""
    return (cell + tl.where(slope > 0, 1.0, 0.0) - x) * inverse
