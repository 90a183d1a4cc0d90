"""Which cells of a grid over the scene's box hold anything (Müller et al. 2022, appendix C).

G cells per side, flat index (x G + y) G + z; M cells to refresh, P points.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import max_pool3d


def cells_to_refresh(
    occupied: Bool[Tensor, "G G G"], *, all_cells: bool, generator: torch.Generator
) -> Int[Tensor, "M"]:
    """Every cell, or a quarter drawn uniformly and up to a quarter drawn from the occupied ones.

    The draws are with replacement: a cell may come up several times.
    """
    total = occupied.numel()
    device = occupied.device
    if all_cells:
        return torch.arange(total, device=device)
    uniform = _random_indices(total, total // 4, generator, device)
    full = occupied.flatten().nonzero().squeeze(1)
    if len(full) > total // 4:
        full = full[_random_indices(len(full), total // 4, generator, device)]
    return torch.cat([uniform, full])


def points_in_cells(
    cells: Int[Tensor, "P"], *, resolution: int, radius: float, generator: torch.Generator
) -> Float[Tensor, "P 3"]:
    """One uniform point in each cell, scene units."""
    corner = torch.stack(
        [cells // resolution**2, cells // resolution % resolution, cells % resolution], dim=-1
    )
    offset = torch.rand(len(cells), 3, generator=generator, device=generator.device).to(cells.device)
    return (corner + offset) * (2 * radius / resolution) - radius


def stratified_times(
    cells: int, num_times: int, *, generator: torch.Generator
) -> Float[Tensor, "cells num_times"]:
    """Time j of a cell is uniform in [j, j + 1) / num_times, drawn independently for each cell.

    Each cell has its own draws, so that an update sees the scene at as many times as there are cells.
    """
    offset = torch.rand(cells, num_times, generator=generator, device=generator.device)
    strata = torch.arange(num_times, device=generator.device)
    return (offset + strata) / num_times


def decay_and_raise(
    occs: Float[Tensor, "N"], cells: Int[Tensor, "M"], values: Float[Tensor, "M"], decay: float
) -> Float[Tensor, "N"]:
    """``max(decay * occs, value)`` at ``cells``; a cell named twice decays once and takes the larger."""
    named = torch.zeros_like(occs, dtype=torch.bool).index_fill(0, cells, True)
    decayed = torch.where(named, decay * occs, occs)
    return decayed.scatter_reduce(0, cells, values, reduce="amax")


def occupied_cells(
    occs: Float[Tensor, "N"], *, resolution: int, threshold: float, dilation: int = 0
) -> Bool[Tensor, "G G G"]:
    """Cells above ``min(threshold, mean of occs)``, and those within ``dilation`` cells of one."""
    occupied = (occs > occs.mean().clamp(max=threshold)).view((resolution,) * 3)
    if dilation:
        window = 2 * dilation + 1
        occupied = max_pool3d(occupied[None, None].float(), window, 1, dilation)[0, 0] > 0
    return occupied


def _random_indices(
    high: int, count: int, generator: torch.Generator, device: torch.device
) -> Int[Tensor, "count"]:
    return torch.randint(high, (count,), generator=generator, device=generator.device).to(device)
