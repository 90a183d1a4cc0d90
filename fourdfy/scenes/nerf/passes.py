"""The rays of a step, split into passes that bound how many samples there are at once.

R rays, N samples over all rays (packed, sorted by ray).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.types import RayBundle, Samples, TensorRecord


@dataclass(frozen=True, kw_only=True)
class FlatRays(TensorRecord):
    """A flat list of rays, each with the data of its frame."""

    origins: Float[Tensor, "R 3"]
    directions: Float[Tensor, "R 3"]
    times: Float[Tensor, "R 1"]
    light_positions: Float[Tensor, "R 3"]

    @classmethod
    def of(cls, rays: RayBundle) -> FlatRays:
        per_frame = rays.directions[0, ..., 0].numel()
        return cls(
            origins=rays.origins.reshape(-1, 3),
            directions=rays.directions.reshape(-1, 3),
            times=rays.times[:, None].repeat_interleave(per_frame, dim=0),
            light_positions=rays.light_positions.repeat_interleave(per_frame, dim=0),
        )

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: slice) -> FlatRays:
        return self.mapped(lambda value: value[index])


@dataclass(frozen=True)
class Pass:
    """Neighbouring rays, and their samples."""

    rays: slice
    samples: slice


def split_rays(ends: Int[Tensor, "R"], limit: int) -> list[Pass]:
    """Passes of whole rays with at most ``limit`` samples each; a ray that has more is a pass by itself.

    Args:
        ends: for each ray, the number of samples up to its last; read back to the host once.
    """
    ends, passes, ray, sample = ends.cpu(), [], 0, 0
    while ray < len(ends):
        stop = max(ray + 1, int(torch.searchsorted(ends, sample + limit, right=True)))
        last = int(ends[stop - 1])
        passes.append(Pass(rays=slice(ray, stop), samples=slice(sample, last)))
        ray, sample = stop, last
    return passes


def last_samples(samples: Samples, n_rays: int) -> Int[Tensor, "R"]:
    """The ``ends`` of ``split_rays``."""
    rays = torch.arange(n_rays, device=samples.ray_indices.device)
    return torch.searchsorted(samples.ray_indices, rays, right=True)


def cut(rays: FlatRays, samples: Samples, part: Pass) -> tuple[FlatRays, Samples]:
    """The rays and samples of a pass; its ray indices count from its first ray."""
    some = Samples(
        ray_indices=samples.ray_indices[part.samples] - part.rays.start,
        t_starts=samples.t_starts[part.samples],
        t_ends=samples.t_ends[part.samples],
    )
    return rays[part.rays], some
