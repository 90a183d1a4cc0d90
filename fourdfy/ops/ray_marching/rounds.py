"""Early termination for rays of any density: their candidates are evaluated in rounds, from near to far.

R rays, M candidates of a round (packed, in the order of the rays). Rays that are still on their way have as
many candidates in a round as its ``limit`` says, and the others drop out. So rounds stay large while their
rays become fewer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.ops.ray_marching.rays import Density, SteppedRays
from fourdfy.types import Samples

FEWEST = {"cpu": 8, "cuda": 16}
"""Device type -> candidates of a ray in the first round, and at least in every other: those behind an opaque
one are evaluated for nothing."""
WORTHWHILE = {"cpu": 1 << 14, "cuda": 1 << 21}
"""Device type -> the number of candidates at which a round's fixed cost does not matter."""


class Walk(ABC):
    """Where rays are on their way through the box. A back end's methods are loops over the rays."""

    PASSED = 2**31 - 1
    """The ``next_steps`` of rays that nothing passes any more."""

    def __init__(self, stepped: SteppedRays) -> None:
        self.stepped, device = stepped, stepped.jitter.device
        self.cells = stepped.padded_cells()
        self.next_steps = torch.zeros(len(stepped), dtype=torch.int32, device=device)
        """The first step of each ray that was not looked up."""
        self.depths = torch.zeros(len(stepped), dtype=torch.float64, device=device)
        """The optical depth, sum of sigma dt, of the candidates of each ray so far."""
        self.totals = torch.zeros(len(stepped), dtype=torch.int32, device=device)
        """The visible samples of each ray so far."""

    @abstractmethod
    def count(self, limit: int, counts: Int[Tensor, "R"]) -> None:
        """Set the number of candidates that each ray has from its next step on, at most ``limit``.

        The next step may become the first of these.
        """

    @abstractmethod
    def take(
        self, ends: Int[Tensor, "R"], total: int
    ) -> tuple[Int[Tensor, "M"], Float[Tensor, "M 3"], Float[Tensor, "M 1"]]:
        """These candidates' steps, midpoints and times; the next step is the one behind them.

        Args:
            ends: for each ray, the number of candidates up to its last.
            total: the last of ``ends``.
        """

    @abstractmethod
    def prune(
        self,
        steps: Int[Tensor, "M"],
        sigmas: Float[Tensor, "M"],
        ends: Int[Tensor, "R"],
        thin: Float[Tensor, ""],
        hidden: float,
        counts: Int[Tensor, "R"],
    ) -> None:
        """Replace steps that are not visible by -1, and set how many are left of each ray.

        Visible are those with at least ``thin`` optical depth behind at most ``hidden`` of it. Rays with more
        than that behind them have ``PASSED``.
        """

    @abstractmethod
    def collect(
        self, steps: Int[Tensor, "M"], ends: Int[Tensor, "R"], kept_ends: Int[Tensor, "R"], kept: int
    ) -> tuple[Int[Tensor, "kept"], Int[Tensor, "kept"], Int[Tensor, "kept"]]:
        """The rays of the steps that are left, these steps, and which sample of its ray each one is.

        Args:
            kept_ends: for each ray, the number of steps left up to its last.
            kept: the last of ``kept_ends``.
        """


def march(walk: Walk) -> Samples:
    """All candidates."""
    if len(walk.stepped) == 0:
        return _samples(walk, [])
    counts = torch.empty_like(walk.totals)
    walk.count(walk.stepped.most_steps, counts)
    ends = counts.cumsum(0)
    if not (total := int(ends[-1])):
        return _samples(walk, [])
    steps, *_ = walk.take(ends, total)
    return _samples(walk, [walk.collect(steps, ends, ends, total)])


def find_visible(
    make_walk: type[Walk],
    stepped: SteppedRays,
    density: Density,
    *,
    alpha_threshold: Float[Tensor, ""],
    transmittance_threshold: float,
    max_samples: int,
) -> Samples:
    """See ``ops.ray_marching``."""
    # Alpha is 1 - exp(-depth), and in float32 it is 1 from a depth of 17.3 on.
    thin = -torch.log1p(-alpha_threshold.double().clamp(max=1 - 2**-25)).float()
    hidden = -math.log(transmittance_threshold) if transmittance_threshold else math.inf

    def find(some: SteppedRays) -> Samples:
        return _find(make_walk(some), density, thin, hidden, max_samples)

    return stepped.in_parts(max(1, max_samples // FEWEST[thin.device.type]), find)


def _find(walk: Walk, density: Density, thin: Float[Tensor, ""], hidden: float, max_samples: int) -> Samples:
    if len(walk.stepped) == 0:
        return _samples(walk, [])
    fewest, worthwhile = FEWEST[thin.device.type], min(WORTHWHILE[thin.device.type], max_samples)
    # Of each ray, the candidates of the coming round and the visible ones of the last.
    tallies = torch.zeros(2, len(walk.stepped), dtype=torch.int32, device=thin.device)
    steps, ends, limit = tallies[0, :0], tallies[0], fewest
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        walk.count(limit, tallies[0])
        # In one piece, because CUDA sums rows of a matrix one number at a time.
        sums = tallies.flatten().cumsum(0).view_as(tallies)
        total, all_told = sums[:, -1].tolist()  # all that a round reads back from the device
        if kept := all_told - total:
            found.append(walk.collect(steps, ends, sums[1] - total, kept))
        if not total:
            return _samples(walk, found)
        ends = sums[0]
        steps, positions, times = walk.take(ends, total)
        walk.prune(steps, density(positions, times), ends, thin, hidden, tallies[1])
        # At most total / limit rays are still on their way: the others had fewer candidates.
        limit = min(max(fewest, worthwhile * limit // total), walk.stepped.most_steps)


def _samples(walk: Walk, found: list[tuple[Tensor, Tensor, Tensor]]) -> Samples:
    """The samples of all rounds in the order of their rays."""
    if not found:
        nothing = walk.stepped.jitter.new_zeros(0)
        return Samples(ray_indices=nothing.long(), t_starts=nothing, t_ends=nothing)
    rays, steps, ranks = (torch.cat(parts) for parts in zip(*found, strict=True))
    places = (walk.totals.cumsum(0) - walk.totals).index_select(0, rays) + ranks
    ray_indices, ordered = (
        torch.empty_like(places).scatter_(0, places, values.long()) for values in (rays, steps)
    )
    jitter, step_size = walk.stepped.jitter.index_select(0, ray_indices), walk.stepped.step_size
    k = ordered + jitter
    return Samples(ray_indices=ray_indices, t_starts=k * step_size, t_ends=(k + 1) * step_size)
