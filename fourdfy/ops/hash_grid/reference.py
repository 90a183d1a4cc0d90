"""The hash grid in plain torch: the definition that every other back end must agree with.

N points, D dimensions, F features per level, K = L*F of all levels, C = 2^D corners of a cell, E entries
of all levels. Any device, float32 or float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.ops.hash_grid.spec import PRIMES, GridLevel, HashGridSpec

UINT32 = 0xFFFFFFFF


def forward(x: Float[Tensor, "N D"], params: Float[Tensor, "P"], spec: HashGridSpec) -> Float[Tensor, "N K"]:
    """See ``hash_grid``. Autograd computes the gradients, of any order."""
    table = params.view(-1, spec.n_features_per_level)
    return torch.cat([_level_features(x, table, level) for level in spec.levels], dim=-1)


def _level_features(
    x: Float[Tensor, "N D"], table: Float[Tensor, "E F"], level: GridLevel
) -> Float[Tensor, "N F"]:
    # Computed in double and rounded once, like a fused multiply-add, so that all back ends choose the
    # same cell for a point on a boundary.
    positions = (x.double() * level.scale + 0.5).to(x.dtype)
    floors = positions.detach().floor()
    weights = _corner_weights(positions - floors)
    entries = level.offset + _corner_entries(floors.long(), level)
    values = table.index_select(0, entries.flatten()).view(*entries.shape, table.shape[1])
    return (weights[..., None] * values).sum(dim=1)


def _corner_weights(fractions: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
    """Bit d of a corner's number says which side of axis d it is on."""
    weights = torch.ones_like(fractions[:, :1])
    for fraction in fractions.split(1, dim=1):
        weights = torch.cat([weights * (1 - fraction), weights * fraction], dim=1)
    return weights


def _corner_entries(cells: Int[Tensor, "N D"], level: GridLevel) -> Int[Tensor, "N C"]:
    """uint32 arithmetic in int64: a negative cell wraps, a dense index runs on into the next row."""
    entries = torch.zeros_like(cells[:, :1])
    for axis, cell in enumerate(cells.split(1, dim=1)):
        stride = PRIMES[axis] if level.hashed else level.resolution**axis
        near, far = cell * stride & UINT32, (cell + 1) * stride & UINT32
        if level.hashed:
            entries = torch.cat([entries ^ near, entries ^ far], dim=1)
        else:
            entries = torch.cat([entries + near, entries + far], dim=1)
    return (entries & UINT32) % level.entries


def gradients(
    x: Tensor, params: Tensor, spec: HashGridSpec, grad_features: Tensor, wants_x: bool, wants_params: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` and ``params`` that are needed; they can be differentiated again."""
    wanted = [tensor for tensor, wants in ((x, wants_x), (params, wants_params)) if wants]
    results = iter(torch.autograd.grad(forward(x, params, spec), wanted, grad_features, create_graph=True))
    return next(results) if wants_x else None, next(results) if wants_params else None
