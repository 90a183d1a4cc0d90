"""The hash grid on the CPU, compiled by numba; float32.

N points, D dimensions, L levels, F features per level, K = L*F, C = 2^D corners of a
cell, B points of a block.

The work is split into blocks of points so that all corners of a block stay in the first-level cache and the
inner loops run over points, which the compiler turns into vector instructions for any D. Blocks are
gathered into runs in which one level's table stays in the second-level cache. Threads never write to
the same memory: the forward and the position gradient split the points, the parameter gradient the levels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from fourdfy.ops.hash_grid import reference
from fourdfy.ops.hash_grid.spec import PRIMES, HashGridSpec

BLOCK = 128
RUN = 16 * BLOCK

logger = logging.getLogger(__name__)


def compiled(function: Callable) -> Callable:
    """``njit``; the machine code is cached on disk if numba finds a writable folder."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError as error:  # raised at the definition
        logger.debug("%s is compiled anew in every process (%s)", function.__name__, error)
        return njit(function, **options)


def forward(x: Float[Tensor, "N D"], params: Float[Tensor, "P"], spec: HashGridSpec) -> Float[Tensor, "N K"]:
    """See ``hash_grid``.

    Raises:
        ValueError: not float32 on the CPU.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"the numba back end computes float32 on the CPU, not {x.dtype} on {x.device}; use backend=auto"
        )
    return _HashGrid.apply(x.contiguous(), params.contiguous(), spec)


class _HashGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, spec):
        ctx.save_for_backward(x, params)
        ctx.spec = spec
        features = x.new_empty(len(x), spec.n_output_dims)
        levels = _level_table(spec)
        arrays = _numpy(x), _numpy(params), levels, _numpy(features)
        _split_points(len(x), lambda start, stop: _interpolate(*arrays, start, stop))
        return features

    @staticmethod
    def backward(ctx, grad_features):
        x, params = ctx.saved_tensors
        wants_x, wants_params, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # create_graph=True: analytic normals that are trained.
            return *reference.gradients(x, params, ctx.spec, grad_features, wants_x, wants_params), None
        levels, grad = _level_table(ctx.spec), _numpy(grad_features.contiguous())
        grad_x = grad_params = None
        if wants_params:
            grad_params = torch.empty_like(params)
            to_params = _numpy(x), levels, grad, _numpy(grad_params)
            _split_levels(len(levels), lambda first, every: _scatter(*to_params, first, every))
        if wants_x:
            grad_x = torch.empty_like(x)
            to_x = _numpy(x), _numpy(params), levels, grad, _numpy(grad_x)
            _split_points(len(x), lambda start, stop: _differentiate(*to_x, start, stop))
        return grad_x, grad_params, None


# ---------------------------------------------------------------------------------------------
# Threads: as many as torch uses. Plain ones, because the kernels release the GIL, numba's own need a
# long compilation each, and an OpenMP pool beside torch's would fight it for the cores.


def _split_points(n_points: int, work: Callable[[int, int], None]) -> None:
    share = -(-n_points // torch.get_num_threads())
    share = max(RUN, -(-share // BLOCK) * BLOCK)
    _run(work, [(start, min(start + share, n_points)) for start in range(0, n_points, share)])


def _split_levels(n_levels: int, work: Callable[[int, int], None]) -> None:
    """Give every k-th level to the same thread, since coarse levels are cheaper than fine ones."""
    n_threads = min(torch.get_num_threads(), n_levels)
    _run(work, [(first, n_threads) for first in range(n_threads)])


def _run(work: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    """Run all parts at once, the first one in this thread."""
    others = [_pool(os.getpid(), len(parts) - 1).submit(work, *part) for part in parts[1:]]
    for part in parts[:1]:
        work(*part)
    for other in others:
        other.result()


@cache
def _pool(pid: int, n_threads: int) -> ThreadPoolExecutor:
    """``pid`` is part of the key because threads do not survive a fork."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="hash_grid")


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: numba compiles a function, not a checking wrapper around it.

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
def _level_table(spec: HashGridSpec) -> np.ndarray:
    def row(level):
        dense = [level.resolution**axis % 2**32 for axis in range(len(PRIMES))]
        return level.scale, level.offset, level.entries, level.hashed, PRIMES if level.hashed else dense

    return np.array([row(level) for level in spec.levels], dtype=LEVEL)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


@compiled
@no_type_check
def _find_corners(x, start, count, level, fractions, weights, entries):
    """Fractions [D, B], weights [C, B] and entries [C, B] of points ``start``... of one level.

    Corners double with each axis: bit d of a corner's number says which side of axis d it is on.
    """
    for i in range(count):
        weights[0, i], entries[0, i] = 1, 0
    near = np.empty(BLOCK, np.uint32)
    for axis in range(x.shape[1]):
        stride, half = level.strides[axis], 1 << axis
        for i in range(count):
            # Computed in double and rounded once, like a fused multiply-add; equal in all back ends.
            position = np.float32(level.scale * np.float64(x[start + i, axis]) + 0.5)
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
    _wrap(entries, 1 << x.shape[1], count, level)


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
    largest = np.uint32(0)
    for corner in range(n_corners):
        for i in range(count):
            # One subtraction serves the unit cube; unsigned, so that min() is the comparison.
            entry = min(entries[corner, i], np.uint32(entries[corner, i] - size))
            entries[corner, i] = entry
            largest = max(largest, entry)
    if largest >= size:
        for corner in range(n_corners):
            for i in range(count):
                entries[corner, i] %= size


@compiled
@no_type_check
def _interpolate(x, params, levels, features, start, stop):
    n_dims, n_features = x.shape[1], features.shape[1] // len(levels)
    n_corners = 1 << n_dims
    fractions = np.empty((n_dims, BLOCK), np.float32)
    weights = np.empty((n_corners, BLOCK), np.float32)
    entries = np.empty((n_corners, BLOCK), np.uint32)
    sums = np.empty((n_features, BLOCK), np.float32)
    for run in range(start, stop, RUN):
        for index in range(len(levels)):
            level = levels[index]
            table = params[level.offset * n_features :]
            for block in range(run, min(run + RUN, stop), BLOCK):
                count = min(BLOCK, stop - block)
                _find_corners(x, block, count, level, fractions, weights, entries)
                for f in range(n_features):
                    for i in range(count):
                        sums[f, i] = 0
                for corner in range(n_corners):
                    if n_features == 2:
                        for i in range(count):
                            at, weight = np.uint64(2) * entries[corner, i], weights[corner, i]
                            sums[0, i] += weight * table[at]
                            sums[1, i] += weight * table[at + np.uint64(1)]
                    else:
                        for i in range(count):
                            at, weight = np.uint64(n_features) * entries[corner, i], weights[corner, i]
                            for f in range(n_features):
                                sums[f, i] += weight * table[at + np.uint64(f)]
                for i in range(count):
                    for f in range(n_features):
                        features[block + i, index * n_features + f] = sums[f, i]


@compiled
@no_type_check
def _scatter(x, levels, grad_features, grad_params, first, every):
    """The parameter gradient of levels ``first``, ``first + every``, ..."""
    n_dims, n_features = x.shape[1], grad_features.shape[1] // len(levels)
    n_corners = 1 << n_dims
    fractions = np.empty((n_dims, BLOCK), np.float32)
    weights = np.empty((n_corners, BLOCK), np.float32)
    entries = np.empty((n_corners, BLOCK), np.uint32)
    grads = np.empty((n_features, BLOCK), np.float32)
    for index in range(first, len(levels), every):
        level = levels[index]
        begin = level.offset * n_features
        table = grad_params[begin : begin + level.entries * n_features]
        for at in range(len(table)):
            table[at] = 0
        for block in range(0, len(x), BLOCK):
            count = min(BLOCK, len(x) - block)
            _find_corners(x, block, count, level, fractions, weights, entries)
            _load(grad_features, block, count, index * n_features, grads)
            for corner in range(n_corners):
                if n_features == 2:
                    for i in range(count):
                        at, weight = np.uint64(2) * entries[corner, i], weights[corner, i]
                        table[at] += weight * grads[0, i]
                        table[at + np.uint64(1)] += weight * grads[1, i]
                else:
                    for i in range(count):
                        at, weight = np.uint64(n_features) * entries[corner, i], weights[corner, i]
                        for f in range(n_features):
                            table[at + np.uint64(f)] += weight * grads[f, i]


@compiled
@no_type_check
def _differentiate(x, params, levels, grad_features, grad_x, start, stop):
    """The position gradient of points ``start`` to ``stop``."""
    n_dims, n_features = x.shape[1], grad_features.shape[1] // len(levels)
    n_corners = 1 << n_dims
    fractions = np.empty((n_dims, BLOCK), np.float32)
    weights = np.empty((n_corners, BLOCK), np.float32)
    entries = np.empty((n_corners, BLOCK), np.uint32)
    grads = np.empty((n_features, BLOCK), np.float32)
    values = np.empty((n_corners, BLOCK), np.float32)
    reduced = np.empty((n_corners, BLOCK), np.float32)
    for run in range(start, stop, RUN):
        for i in range(run, min(run + RUN, stop)):
            for axis in range(n_dims):
                grad_x[i, axis] = 0
        for index in range(len(levels)):
            level = levels[index]
            table = params[level.offset * n_features :]
            for block in range(run, min(run + RUN, stop), BLOCK):
                count = min(BLOCK, stop - block)
                _find_corners(x, block, count, level, fractions, weights, entries)
                _load(grad_features, block, count, index * n_features, grads)
                for corner in range(n_corners):
                    if n_features == 2:
                        for i in range(count):
                            at = np.uint64(2) * entries[corner, i]
                            values[corner, i] = (
                                table[at] * grads[0, i] + table[at + np.uint64(1)] * grads[1, i]
                            )
                    else:
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
def _load(rows, start, count, column, into):
    """Columns of a block of points, one after the other, so that the corners' loops read them in order."""
    for i in range(count):
        for f in range(len(into)):
            into[f, i] = rows[start + i, column + f]


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
