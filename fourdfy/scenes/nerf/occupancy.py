"""The occupancy grid: which cells a renderer can skip.

The buffers have nerfacc's names and shapes (one level), so that checkpoints keep them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fourdfy.ops.occupancy import (
    cells_to_refresh,
    decay_and_raise,
    occupied_cells,
    points_in_cells,
    stratified_times,
)
from fourdfy.ops.ranks import spread

Density = Callable[[Float[Tensor, "P 3"], Float[Tensor, "P 1"]], Float[Tensor, "P"]]


class OccupancyGrid(nn.Module):
    """One grid over space for all times: a cell is occupied if it is dense at any time.

    Empty until the first ``refresh``.
    """

    resolution: Tensor
    aabbs: Tensor
    occs: Float[Tensor, "N"]
    """Decaying maximum of density times step size that was seen in each cell."""
    binaries: Bool[Tensor, "1 G G G"]

    def __init__(self, resolution: int, radius: float) -> None:
        super().__init__()
        self.cells_per_side, self.radius = resolution, radius
        self.register_buffer("resolution", torch.full((3,), resolution, dtype=torch.int32))
        self.register_buffer("aabbs", torch.tensor([[-radius] * 3 + [radius] * 3]))
        self.register_buffer("occs", torch.zeros(resolution**3))
        self.register_buffer("binaries", torch.zeros((1,) + (resolution,) * 3, dtype=torch.bool))

    @property
    def occupied(self) -> Bool[Tensor, "G G G"]:
        return self.binaries[0]

    @torch.no_grad()
    def refresh(
        self,
        density: Density,
        *,
        step_size: float,
        all_cells: bool,
        num_times: int,
        threshold: float,
        generator: torch.Generator,
        decay: float = 0.95,
        dilation: int = 0,
        chunk_size: int = 160000,
    ) -> None:
        """Evaluate random points of some cells, at ``num_times`` random times each (0: at time 0).

        Args:
            density: function of points and times, per scene unit.
            all_cells: refresh every cell instead of a random quarter and occupied ones.
            chunk_size: points per call of ``density``.
        """
        cells = cells_to_refresh(self.occupied, all_cells=all_cells, generator=generator)
        if num_times:
            times = stratified_times(len(cells), num_times, generator=generator).to(self.occs)
        else:
            times = self.occs.new_zeros(len(cells), 1)
        points = points_in_cells(
            cells.repeat_interleave(times.shape[1]),
            resolution=self.cells_per_side,
            radius=self.radius,
            generator=generator,
        )

        def in_chunks(points: Float[Tensor, "P 3"], moments: Float[Tensor, "P 1"]) -> Float[Tensor, "P"]:
            pieces = zip(points.split(chunk_size), moments.split(chunk_size), strict=True)
            return torch.cat([density(*piece) for piece in pieces])

        values = spread(in_chunks, points, times.reshape(-1, 1))
        values = (values * step_size).view_as(times).amax(dim=1).to(self.occs)
        self.occs.copy_(decay_and_raise(self.occs, cells, values, decay))
        self.binaries[0] = occupied_cells(
            self.occs, resolution=self.cells_per_side, threshold=threshold, dilation=dilation
        )
