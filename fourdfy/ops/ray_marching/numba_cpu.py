"""Ray marching on the CPU, compiled by numba; float32.

R rays, M candidates of a round, P cells per side of the padded grid. Threads share out the rays, and each
ray's sums are its own, so results do not depend on the number of threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor

from fourdfy.ops.cpu import array, compiled, in_parallel, shares
from fourdfy.ops.ray_marching import rounds
from fourdfy.ops.ray_marching.rays import Density, SteppedRays
from fourdfy.types import Samples

PASSED = rounds.Walk.PASSED

unfused = partial(compiled, fuse=False)
"""Products and sums are rounded one by one, as in torch, except where doubles stand in for one rounding."""


def march(stepped: SteppedRays) -> Samples:
    """See ``ops.ray_marching``."""
    return rounds.march(NumbaWalk(stepped))


def find_visible(stepped: SteppedRays, density: Density, **limits: Any) -> Samples:
    """See ``ops.ray_marching``."""
    return rounds.find_visible(NumbaWalk, stepped, density, **limits)


class NumbaWalk(rounds.Walk):
    """Rays on their way, on the CPU."""

    def __init__(self, stepped: SteppedRays) -> None:
        super().__init__(stepped)
        rays, size, radius = stepped.rays, len(self.cells), stepped.radius
        self.last_steps = torch.empty_like(self.next_steps)
        given = rays.origins, rays.directions, rays.times, stepped.jitter
        self.inputs = [array(value.float().contiguous()) for value in given]  # autocast halves some
        self.grid = array(self.cells.view(torch.uint8).flatten())
        self.shape = radius, (size - 2) / (2 * radius), stepped.step_size, size
        used = self.cells.nonzero()
        # Half a cell of slack absorbs rounding at the faces.
        bounds = (used.amin(0) - 0.5, used.amax(0) + 1.5) if len(used) else (torch.zeros(3),) * 2
        self._share_out(_enter, *self.inputs, self.next_steps, self.last_steps, *bounds, *self.shape[:3])

    def count(self, limit, counts):
        positions, times = (self.depths[:0].float().view(0, width) for width in (3, 1))
        self._follow(counts, self.totals[:0], positions, times, limit)

    def take(self, ends, total):
        steps = self.totals.new_empty(total)
        positions, times = (torch.empty(total, width) for width in (3, 1))
        self._follow(ends, steps, positions, times, 0)
        return steps, positions, times

    def prune(self, steps, sigmas, ends, thin, hidden, counts):
        state = self.depths, self.next_steps, counts
        limits = float(thin), hidden, self.stepped.step_size
        self._share_out(_prune, steps, sigmas.contiguous(), self.inputs[3], ends, *state, *limits)

    def collect(self, steps, ends, kept_ends, kept):
        rays, kept_steps, ranks = (steps.new_empty(kept) for _ in range(3))
        self._share_out(_collect, steps, ends, kept_ends, self.totals, rays, kept_steps, ranks)
        return rays, kept_steps, ranks

    def _follow(self, numbers: Tensor, steps: Tensor, positions: Tensor, times: Tensor, limit: int) -> None:
        """Count into ``numbers``, or, without a limit, take as many as its running sums say."""
        state = self.grid, self.next_steps, self.last_steps, numbers
        self._share_out(_follow, *self.inputs, *state, steps, positions, times, *self.shape, limit)

    def _share_out(self, kernel, *arguments) -> None:
        given = [array(value) if isinstance(value, Tensor) else value for value in arguments]
        in_parallel(lambda start, stop: kernel(*given, start, stop), shares(0, len(self.stepped), 256))


# ---------------------------------------------------------------------------------------------
# Kernels, of rays ``start`` to ``stop``. No type checks: numba compiles a function, not a checking wrapper
# around it.


@unfused
@no_type_check
def _enter(
    origins,
    directions,
    times,
    jitter,
    next_steps,
    last_steps,
    lowest,
    highest,
    radius,
    to_cells,
    step_size,
    start,
    stop,
):
    """The first and last steps that may have their midpoints in an occupied cell; the last is -1 without."""
    for ray in range(start, stop):
        near, far = np.float32(0), np.float32(np.inf)
        for axis in range(3):
            x, slope = _in_cells(origins, directions, ray, axis, radius, to_cells)
            # A ray parallel to a face: +-inf are the right distances, 0 / 0 is not.
            inverse = np.float32(1) / (slope if abs(slope) >= np.float32(1e-30) else np.float32(1e-30))
            lower, upper = (lowest[axis] - x) * inverse, (highest[axis] - x) * inverse
            near, far = max(near, min(lower, upper)), min(far, max(lower, upper))
        next_steps[ray], last_steps[ray] = 0, -1
        if far > near:
            # One more step at either end: the midpoint decides, not the rounding of the entry.
            u = np.float64(jitter[ray]) + 0.5
            next_steps[ray] = np.int32(max(np.floor(near / step_size - u), 0.0))
            last_steps[ray] = np.int32(np.ceil(far / step_size - u))


@unfused
@no_type_check
def _follow(
    origins,
    directions,
    times,
    jitter,
    grid,
    next_steps,
    last_steps,
    numbers,
    steps,
    positions,
    sample_times,
    radius,
    to_cells,
    step_size,
    size,
    limit,
    start,
    stop,
):
    """Go from each ray's next step to the end of the box, or to so many candidates."""
    taking, dt = limit == 0, np.float32(step_size)
    for ray in range(start, stop):
        at, wanted = 0, limit
        if taking:
            at = numbers[ray - 1] if ray else 0
            wanted = numbers[ray] - at
        step, last, u, taken = next_steps[ray], last_steps[ray], jitter[ray], 0
        x, slope_x = _in_cells(origins, directions, ray, 0, radius, to_cells)
        y, slope_y = _in_cells(origins, directions, ray, 1, radius, to_cells)
        z, slope_z = _in_cells(origins, directions, ray, 2, radius, to_cells)
        while step <= last and taken < wanted:
            k = np.float32(step) + u
            middle = (k + np.float32(0.5)) * dt
            cell_x = _cell(_along(x, slope_x, middle), size)
            cell_y = _cell(_along(y, slope_y, middle), size)
            cell_z = _cell(_along(z, slope_z, middle), size)
            if grid[(cell_x * size + cell_y) * size + cell_z]:
                if taking:
                    t = (k * dt + (k + np.float32(1)) * dt) / np.float32(2)
                    steps[at + taken] = step
                    for axis in range(3):
                        positions[at + taken, axis] = _along(origins[ray, axis], directions[ray, axis], t)
                    sample_times[at + taken, 0] = times[ray, 0]
                taken += 1
            step += 1
        if taking:
            next_steps[ray] = step
        else:
            numbers[ray] = taken


@unfused
@no_type_check
def _prune(steps, sigmas, jitter, ends, depths, next_steps, counts, thin, hidden, step_size, start, stop):
    dt = np.float32(step_size)
    for ray in range(start, stop):
        kept, before = 0, depths[ray]
        for at in range(ends[ray - 1] if ray else 0, ends[ray]):
            k = np.float32(steps[at]) + jitter[ray]
            depth = sigmas[at] * ((k + np.float32(1)) * dt - k * dt)
            if depth >= thin and before <= hidden:
                kept += 1
            else:
                steps[at] = -1
            before += np.float64(depth)
        counts[ray], depths[ray] = kept, before
        if not before <= hidden:
            next_steps[ray] = PASSED


@unfused
@no_type_check
def _collect(steps, ends, kept_ends, totals, rays, kept_steps, ranks, start, stop):
    for ray in range(start, stop):
        to, rank = kept_ends[ray - 1] if ray else 0, totals[ray]
        if to == kept_ends[ray]:
            continue
        for at in range(ends[ray - 1] if ray else 0, ends[ray]):
            if steps[at] >= 0:
                rays[to], kept_steps[to], ranks[to] = ray, steps[at], rank
                to += 1
                rank += 1
        totals[ray] = rank


@unfused
@no_type_check
def _in_cells(origins, directions, ray, axis, radius, to_cells):
    """Origin and direction of a ray along an axis, in padded cells."""
    x = (origins[ray, axis] + np.float32(radius)) * np.float32(to_cells) + np.float32(1)
    return x, directions[ray, axis] * np.float32(to_cells)


@unfused
@no_type_check
def _along(origin, direction, t):
    return np.float32(np.float64(origin) + np.float64(direction) * np.float64(t))


@unfused
@no_type_check
def _cell(x, size):
    return np.int64(min(max(x, np.float32(0)), np.float32(size - 1)))
