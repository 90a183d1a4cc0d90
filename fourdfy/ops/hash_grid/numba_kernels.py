"""The loops of the hash grid's numba back end; float32.

N points, D dimensions, L levels, F features per level, K = L*F, C = 2^D corners of a cell, B points of a
block, E entries of a level.

The work is split into blocks of points so that all corners of a block stay in the first-level cache. What
vector instructions can compute (cells, weights, entries) is done corner by corner, with inner loops over
points; what they can't (reading and adding table entries) point by point, eight corners at a time, so that
the loop over these is unrolled. Blocks are gathered into runs in which one level's table stays in the
second-level cache.

No type checks: numba compiles a function, not a checking wrapper around it.
"""

from __future__ import annotations

from functools import cache
from typing import no_type_check

import numpy as np

from fourdfy.ops.cpu import compiled
from fourdfy.ops.hash_grid.spec import PRIMES, HashGridSpec

BLOCK = 128
RUN = 16 * BLOCK

LEVEL = np.dtype(
    [
        ("scale", np.float64),
        ("offset", np.int64),
        ("entries", np.uint32),
        ("hashed", np.bool_),
        ("strides", np.uint32, (len(PRIMES),)),
    ]
)


@cache
def level_table(spec: HashGridSpec) -> np.ndarray:
    def row(level):
        dense = [level.resolution**axis % 2**32 for axis in range(len(PRIMES))]
        return level.scale, level.offset, level.entries, level.hashed, PRIMES if level.hashed else dense

    return np.array([row(level) for level in spec.levels], dtype=LEVEL)


@compiled
@no_type_check
def interpolate(x, n_dims, params, levels, features, start, stop):
    """Features of points ``start`` to ``stop``, from the first ``n_dims`` coordinates of each."""
    n_features = features.shape[1] // len(levels)
    columns = np.empty((n_dims, RUN), np.float32)
    fractions, weights, entries = _buffers(n_dims)
    for run in range(start, stop, RUN):
        end = min(run + RUN, stop)
        _load(x, run, end - run, 0, columns)
        for index in range(len(levels)):
            level = levels[index]
            table = params[level.offset * n_features :]
            for block in range(run, end, BLOCK):
                count = min(BLOCK, end - block)
                _find_corners(columns, block - run, count, level, fractions, weights, entries)
                for i in range(count):
                    if n_features == 2:
                        first, second = np.float32(0), np.float32(0)
                        for corners in range(0, len(weights), 8):
                            for corner in range(corners, corners + 8):
                                at, weight = np.uint64(2) * entries[corner, i], weights[corner, i]
                                first += weight * table[at]
                                second += weight * table[at + np.uint64(1)]
                        features[block + i, 2 * index] = first
                        features[block + i, 2 * index + 1] = second
                    else:
                        for f in range(n_features):
                            total = np.float32(0)
                            for corner in range(len(weights)):
                                at = np.uint64(n_features) * entries[corner, i] + np.uint64(f)
                                total += weights[corner, i] * table[at]
                            features[block + i, index * n_features + f] = total


@compiled
@no_type_check
def scatter(x, n_dims, levels, index, grad_features, table, start, stop):
    """Add the gradient of points ``start`` to ``stop`` to the ``table`` of the level ``index``."""
    n_features = grad_features.shape[1] // len(levels)
    level = levels[index]
    columns = np.empty((n_dims, BLOCK), np.float32)
    grads = np.empty((n_features, BLOCK), np.float32)
    fractions, weights, entries = _buffers(n_dims)
    for block in range(start, stop, BLOCK):
        count = min(BLOCK, stop - block)
        _load(x, block, count, 0, columns)
        _load(grad_features, block, count, index * n_features, grads)
        _find_corners(columns, 0, count, level, fractions, weights, entries)
        # Point by point: neighbours often add to the same entries, and an addition right after another
        # one to the same place waits for it.
        for i in range(count):
            if n_features == 2:
                first, second = grads[0, i], grads[1, i]
                for corner in range(1 << n_dims):
                    at, weight = np.uint64(2) * entries[corner, i], weights[corner, i]
                    table[at] += weight * first
                    table[at + np.uint64(1)] += weight * second
            else:
                for corner in range(1 << n_dims):
                    at, weight = np.uint64(n_features) * entries[corner, i], weights[corner, i]
                    for f in range(n_features):
                        table[at + np.uint64(f)] += weight * grads[f, i]


@compiled
@no_type_check
def differentiate(x, params, levels, grad_features, grad_x, start, stop):
    """The position gradient of points ``start`` to ``stop``."""
    n_dims, n_features = x.shape[1], grad_features.shape[1] // len(levels)
    n_corners = 1 << n_dims
    columns = np.empty((n_dims, RUN), np.float32)
    fractions, weights, entries = _buffers(n_dims)
    grads = np.empty((n_features, BLOCK), np.float32)
    values = np.empty((n_corners, BLOCK), np.float32)
    reduced = np.empty((n_corners, BLOCK), np.float32)
    for run in range(start, stop, RUN):
        end = min(run + RUN, stop)
        _load(x, run, end - run, 0, columns)
        for i in range(run, end):
            for axis in range(n_dims):
                grad_x[i, axis] = 0
        for index in range(len(levels)):
            level = levels[index]
            table = params[level.offset * n_features :]
            for block in range(run, end, BLOCK):
                count = min(BLOCK, end - block)
                _find_corners(columns, block - run, count, level, fractions, weights, entries)
                _load(grad_features, block, count, index * n_features, grads)
                for corner in range(n_corners):
                    for i in range(count):
                        at, value = np.uint64(n_features) * entries[corner, i], np.float32(0)
                        for f in range(n_features):
                            value += table[at + np.uint64(f)] * grads[f, i]
                        values[corner, i] = value
                for derived in range(n_dims):
                    _derive(values, fractions, reduced, derived, n_dims, count)
                    for i in range(count):
                        grad_x[block + i, derived] += np.float32(level.scale) * reduced[0, i]


@compiled
@no_type_check
def _buffers(n_dims):
    """Fractions [D, B], weights [C, B] and entries [C, B], with zeros where C is less than 8."""
    n_rows = max(8, 1 << n_dims)
    fractions = np.empty((n_dims, BLOCK), np.float32)
    return fractions, np.zeros((n_rows, BLOCK), np.float32), np.zeros((n_rows, BLOCK), np.uint32)


@compiled
@no_type_check
def _load(rows, start, count, column, into):
    """Columns of a block of points, one after the other, so that later loops read them in order."""
    for i in range(count):
        for f in range(len(into)):
            into[f, i] = rows[start + i, column + f]


@compiled
@no_type_check
def _find_corners(columns, start, count, level, fractions, weights, entries):
    """Fractions, weights and entries of points ``start``... of one level.

    Corners double with each axis: bit d of a corner's number says which side of axis d it is on.
    """
    n_dims = len(columns)
    for i in range(count):
        weights[0, i], entries[0, i] = 1, 0
    near = np.empty(BLOCK, np.uint32)
    for axis in range(n_dims):
        stride, half = level.strides[axis], 1 << axis
        # A slice, because numba allows for indices below 0 in a sum, and vectors would be gathered.
        column = columns[axis, start : start + count]
        for i in range(count):
            # Computed in double and rounded once, like a fused multiply-add; equal in all back ends.
            position = np.float32(level.scale * np.float64(column[i]) + 0.5)
            floor = np.floor(position)
            fractions[axis, i] = position - floor
            near[i] = np.uint32(np.int32(floor)) * stride
        for corner in range(half):
            for i in range(count):
                fraction, weight = fractions[axis, i], weights[corner, i]
                weights[corner + half, i] = weight * fraction
                weights[corner, i] = weight - weight * fraction
            if level.hashed:
                for i in range(count):
                    entries[corner + half, i] = entries[corner, i] ^ np.uint32(near[i] + stride)
                    entries[corner, i] = entries[corner, i] ^ near[i]
            else:
                for i in range(count):
                    entries[corner, i] = np.uint32(entries[corner, i] + near[i])
                    entries[corner + half, i] = np.uint32(entries[corner, i] + stride)
    _wrap(entries, 1 << n_dims, count, level)


@compiled
@no_type_check
def _wrap(entries, n_corners, count, level):
    """Entries modulo the level's size."""
    size = level.entries
    if level.hashed:
        mask = np.uint32(size - 1)  # a hashed level has a power of two of entries
        for corner in range(n_corners):
            for i in range(count):
                entries[corner, i] &= mask
        return
    # A cell's first corner has its smallest entry, and the last its largest.
    largest = np.uint32(0)
    for i in range(count):
        largest = max(largest, max(entries[0, i], entries[n_corners - 1, i]))
    if largest >= size:
        for corner in range(n_corners):
            for i in range(count):
                entries[corner, i] %= size


@compiled
@no_type_check
def _derive(values, fractions, reduced, derived, n_dims, count):
    """reduced[0]: the corner values' difference along axis ``derived``, interpolated in the others."""
    for corner in range(1 << n_dims):
        for i in range(count):
            reduced[corner, i] = values[corner, i]
    for axis in range(n_dims - 1, -1, -1):
        half = 1 << axis
        for corner in range(half):
            if axis == derived:
                for i in range(count):
                    reduced[corner, i] = reduced[corner + half, i] - reduced[corner, i]
            else:
                for i in range(count):
                    step = reduced[corner + half, i] - reduced[corner, i]
                    reduced[corner, i] += fractions[axis, i] * step
