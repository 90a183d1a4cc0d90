"""The hash grid on the CPU, compiled by numba; float32.

N points, D dimensions, K features of a point, P parameters over all levels.

Threads never write to the same memory: the forward and the position gradient split the points, the
parameter gradient the levels.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.cpu import array, in_parallel, shares
from fourdfy.ops.hash_grid import reference
from fourdfy.ops.hash_grid.numba_kernels import BLOCK, differentiate, interpolate, level_table, scatter
from fourdfy.ops.hash_grid.slices import cut, find_runs, slice_table, spread
from fourdfy.ops.hash_grid.spec import HashGridSpec


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
        ctx.spec, ctx.runs = spec, find_runs(array(x), spec)
        features = x.new_empty(len(x), spec.n_output_dims)
        arrays = array(x), array(params), array(features)
        if ctx.runs is None:
            _interpolate(*arrays, spec)
        else:
            _interpolate_in_slices(*arrays, spec, ctx.runs)
        return features

    @staticmethod
    def backward(ctx, grad_features):
        x, params = ctx.saved_tensors
        wants_x, wants_params, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # create_graph=True: analytic normals that are trained.
            return *reference.gradients(x, params, ctx.spec, grad_features, wants_x, wants_params), None
        points, grad = array(x), array(grad_features.contiguous())
        grad_x = grad_params = None
        if wants_params:
            grad_params = torch.zeros_like(params)
            _scatter(points, grad, array(grad_params), ctx.spec, ctx.runs)
        if wants_x:
            grad_x = torch.empty_like(x)
            into, levels = array(grad_x), level_table(ctx.spec)
            in_parallel(
                lambda start, stop: differentiate(points, array(params), levels, grad, into, start, stop),
                shares(0, len(x), BLOCK),
            )
        return grad_x, grad_params, None


def _interpolate(x: np.ndarray, params: np.ndarray, features: np.ndarray, spec: HashGridSpec) -> None:
    n_dims, levels = x.shape[1], level_table(spec)
    in_parallel(
        lambda start, stop: interpolate(x, n_dims, params, levels, features, start, stop),
        shares(0, len(x), BLOCK),
    )


def _interpolate_in_slices(
    x: np.ndarray, params: np.ndarray, features: np.ndarray, spec: HashGridSpec, runs: list[tuple[int, int]]
) -> None:
    n_dims, levels, slice_levels = x.shape[1], level_table(spec), slice_table(spec)
    vertices = sum(int(entries) for entries in slice_levels["entries"])
    sliced = np.empty((len(runs), vertices * spec.n_features_per_level), np.float32)

    def cut_run(run: int) -> None:
        cut(params, levels, slice_levels, n_dims, x[runs[run][0], -1], sliced[run])

    def interpolate_run(run: int, start: int, stop: int) -> None:
        interpolate(x, n_dims - 1, sliced[run], slice_levels, features, start, stop)

    parts = [(run, *part) for run, ends in enumerate(runs) for part in shares(*ends, BLOCK)]
    in_parallel(cut_run, [(run,) for run in range(len(runs))])
    in_parallel(interpolate_run, parts)


def _scatter(
    x: np.ndarray,
    grad: np.ndarray,
    grad_params: np.ndarray,
    spec: HashGridSpec,
    runs: list[tuple[int, int]] | None,
) -> None:
    """Levels are shared out, every k-th to the same thread, since coarse ones are cheaper than fine ones."""
    n_dims, levels = x.shape[1], level_table(spec)

    def entries_of(index: int) -> np.ndarray:
        start, size = int(levels[index]["offset"]), int(levels[index]["entries"])
        return grad_params.reshape(-1, spec.n_features_per_level)[start : start + size].reshape(-1)

    def scatter_level(index: int) -> None:
        if runs is None:
            scatter(x, n_dims, levels, index, grad, entries_of(index), 0, len(x))
            return
        slice_levels = slice_table(spec)
        for start, stop in runs:
            sliced = np.zeros(int(slice_levels[index]["entries"]) * spec.n_features_per_level, np.float32)
            scatter(x, n_dims - 1, slice_levels, index, grad, sliced, start, stop)
            spread(sliced, levels, slice_levels, index, n_dims, x[start, -1], entries_of(index))

    in_parallel(scatter_level, [(index,) for index in range(len(levels))])
