"""Rays cut into steps of equal length: what every back end of ``ops.ray_marching`` reads.

R rays, N samples over all rays (packed, sorted by ray), M points, G cells per side of the occupancy grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fourdfy.types import Samples, TensorRecord, joined_records

AnyRays = TypeVar("AnyRays", bound="Rays")

Density = Callable[[Float[Tensor, "M 3"], Float[Tensor, "M 1"]], Float[Tensor, "M"]]
"""Densities per scene unit, never negative, of points and their times."""


@dataclass(frozen=True, kw_only=True)
class Rays(TensorRecord):
    """A flat list of rays, each with its scene time."""

    origins: Float[Tensor, "R 3"]
    directions: Float[Tensor, "R 3"]
    """Unit length, so distances along a ray are in scene units."""
    times: Float[Tensor, "R 1"]

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self: AnyRays, index: slice) -> AnyRays:
        return self.mapped(lambda value: value[index])

    def midpoints(self, samples: Samples) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N 1"]]:
        """Positions and times of samples."""
        # index_select, here and elsewhere: several times faster than indexing on the CPU.
        origins, directions, times = (
            values.index_select(0, samples.ray_indices)
            for values in (self.origins, self.directions, self.times)
        )
        t_mids = (samples.t_starts + samples.t_ends) / 2
        return torch.addcmul(origins, directions, t_mids[:, None]), times


@dataclass(frozen=True, kw_only=True)
class SteppedRays:
    """Rays through the box ``[-radius, radius]^3``, of which some cells are occupied.

    Step k of a ray is the interval from ``(jitter + k) step_size`` to ``(jitter + k + 1) step_size``,
    k = 0, 1, ... It is a candidate if its midpoint lies in the box and in an occupied cell.
    """

    rays: Rays
    jitter: Float[Tensor, "R"]
    """In [0, 1); zeros give the same intervals each time."""
    radius: float
    step_size: float
    occupied: Bool[Tensor, "G G G"] | None = None
    """Cells over the box, indexed x, y, z; None: the whole box."""

    def __len__(self) -> int:
        return len(self.rays)

    @property
    def most_steps(self) -> int:
        """A bound on the number of steps that a ray has in the box."""
        return math.ceil(math.sqrt(12) * self.radius / self.step_size) + 1

    def padded_cells(self) -> Bool[Tensor, "P P P"]:
        """The grid with a rim of empty cells, so that a lookup also answers "outside the box"."""
        occupied = self.occupied
        if occupied is None:
            occupied = torch.ones(1, 1, 1, dtype=torch.bool, device=self.jitter.device)
        return torch.nn.functional.pad(occupied, (1,) * 6)

    def in_parts(self, size: int, find: Callable[[SteppedRays], Samples]) -> Samples:
        """The samples that ``find`` gives for at most ``size`` rays at once."""
        if len(self) <= size:
            return find(self)
        found = []
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            samples = find(replace(self, rays=self.rays[part], jitter=self.jitter[part]))
            found.append(replace(samples, ray_indices=samples.ray_indices + first))
        return joined_records(found)


def step_size(radius: float, num_samples_per_ray: int) -> float:
    """The interval length that cuts the box's diagonal into ``num_samples_per_ray``."""
    return 1.732 * 2 * radius / num_samples_per_ray
