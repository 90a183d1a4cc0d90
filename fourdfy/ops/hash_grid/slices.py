"""A grid of D dimensions at one value of the last coordinate is a grid of D - 1 dimensions.

All points of a frame have one time. So the space-time grid is interpolated in time once for the frame, at
the vertices of its levels, and then for each point in space alone: half as many corners, whose entries
moreover stand side by side, where they were hashed. The sums are the same but for their order.

N points, F features per level, V vertices of a slice over all levels.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import no_type_check

import numpy as np

from fourdfy.ops.cpu import compiled
from fourdfy.ops.hash_grid.numba_kernels import level_table
from fourdfy.ops.hash_grid.spec import HashGridSpec

WORTHWHILE = 4
"""Vertices of slices per point up to which making them takes less time than is saved."""


@cache
def slice_table(spec: HashGridSpec) -> np.ndarray:
    """The levels of a slice; all are dense, and none wraps around in the unit cube."""
    table, offset, n_dims = np.array(level_table(spec)), 0, spec.n_input_dims - 1
    for row, level in zip(table, spec.levels, strict=True):
        # Strides of a dense level stay as they are, and its last row runs on into the next one.
        side = level.resolution + level.hashed
        vertices = side**n_dims if level.hashed else sum(side**axis for axis in range(n_dims + 1))
        row["offset"], row["entries"], row["hashed"] = offset, vertices, False
        row["strides"] = [side**axis % 2**32 for axis in range(len(row["strides"]))]
        offset += vertices
    return table


def find_runs(x: np.ndarray, spec: HashGridSpec) -> list[tuple[int, int]] | None:
    """Ranges of neighbouring points with one last coordinate; None if they are not worth a slice each."""
    if spec.n_input_dims < 2 or len(x) == 0:
        return None
    vertices = sum((level.resolution + 1) ** (spec.n_input_dims - 1) for level in spec.levels)
    starts = np.empty(WORTHWHILE * len(x) // vertices, np.int64)
    count = _find_runs(x, 0.25 / max(level.scale for level in spec.levels), starts)
    return list(pairwise([*starts[:count].tolist(), len(x)])) if count else None


@compiled
@no_type_check
def _find_runs(x, margin, starts):
    """Where runs begin, and how many they are; 0 if they don't fit, or a point is outside the unit cube."""
    last, count = x.shape[1] - 1, 0
    low, high = np.float32(-margin), np.float32(1 + margin)
    for i in range(len(x)):
        if i == 0 or x[i, last] != x[i - 1, last]:
            if count == len(starts):
                return 0
            starts[count] = i
            count += 1
        for axis in range(last + 1):
            if not low <= x[i, axis] <= high:
                return 0
    return count


@compiled
@no_type_check
def cut(params, levels, slice_levels, n_dims, at, sliced):
    """Fill the parameters of the slice ``at`` the last coordinate."""
    n_features = len(sliced) // (slice_levels[-1].offset + slice_levels[-1].entries)
    for index in range(len(levels)):
        table = params[levels[index].offset * n_features :]
        into = sliced[slice_levels[index].offset * n_features :]
        near, far, weight = _neighbours(levels[index], slice_levels[index], n_dims, at)
        for vertex in range(len(near)):
            for f in range(n_features):
                low = table[np.uint64(n_features) * near[vertex] + np.uint64(f)]
                high = table[np.uint64(n_features) * far[vertex] + np.uint64(f)]
                into[n_features * vertex + f] = low + weight * (high - low)


@compiled
@no_type_check
def spread(grad_sliced, levels, slice_levels, index, n_dims, at, grad_table):
    """Add the gradient of the slice ``at`` the last coordinate to that of the level ``index``."""
    near, far, weight = _neighbours(levels[index], slice_levels[index], n_dims, at)
    n_features = len(grad_sliced) // len(near)
    for vertex in range(len(near)):
        for f in range(n_features):
            grad = grad_sliced[n_features * vertex + f]
            grad_table[np.uint64(n_features) * near[vertex] + np.uint64(f)] += (1 - weight) * grad
            grad_table[np.uint64(n_features) * far[vertex] + np.uint64(f)] += weight * grad


@compiled
@no_type_check
def _neighbours(level, slice_level, n_dims, at):
    """The entries before and after ``at`` of each vertex, and the weight of the latter."""
    position = np.float32(level.scale * np.float64(at) + 0.5)
    floor = np.floor(position)
    near = np.empty(slice_level.entries, np.uint32)
    far = np.empty(slice_level.entries, np.uint32)
    _find_entries(level, slice_level, n_dims, np.uint32(np.int32(floor)), near)
    _find_entries(level, slice_level, n_dims, np.uint32(np.int32(floor) + 1), far)
    return near, far, position - floor


@compiled
@no_type_check
def _find_entries(level, slice_level, n_dims, cell, entries):
    """The entry of each vertex in the layer ``cell`` of the last axis."""
    start = np.uint32(cell * level.strides[n_dims - 1])
    if not level.hashed:
        entry = start % level.entries
        for vertex in range(len(entries)):
            entries[vertex] = entry
            entry = np.uint32(0) if entry + 1 == level.entries else np.uint32(entry + 1)
        return
    mask, side = np.uint32(level.entries - 1), np.int64(slice_level.strides[1])
    for row in range(len(entries) // side):
        hashed, rest = start, row
        for axis in range(1, n_dims - 1):
            hashed ^= np.uint32(np.uint32(rest % side) * level.strides[axis])
            rest //= side
        for x in range(side):
            entries[row * side + x] = (hashed ^ np.uint32(np.uint32(x) * level.strides[0])) & mask
