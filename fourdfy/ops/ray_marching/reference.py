"""The definition of ray marching: every step is looked up, and every candidate evaluated.

R rays, N samples over all rays (packed, sorted by ray), K steps, G cells per side of the occupancy grid.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fourdfy.ops.compositing.reference import alphas_from_density, transmittance_from_density
from fourdfy.ops.ray_marching.rays import Density, SteppedRays
from fourdfy.types import Samples

# A candidate matrix of this size fits the CPU's caches, where the loop is a third faster than in one
# piece; a GPU wants few launches.
MAX_CANDIDATES = {"cpu": 1 << 17, "cuda": 1 << 25}


def find_visible(
    stepped: SteppedRays,
    density: Density,
    *,
    alpha_threshold: float | Float[Tensor, ""],
    transmittance_threshold: float,
    max_samples: int,
) -> Samples:
    """See ``ops.ray_marching``."""

    def find(some: SteppedRays) -> Samples:
        samples = march(some)
        seen = visible(
            samples,
            density(*some.rays.midpoints(samples)),
            len(some),
            alpha_threshold=alpha_threshold,
            transmittance_threshold=transmittance_threshold,
        )
        kept = seen.nonzero().squeeze(1)
        return samples.mapped(lambda value: value.index_select(0, kept))

    return stepped.in_parts(max(1, max_samples // stepped.most_steps), find)


def march(stepped: SteppedRays, max_candidates: int | None = None) -> Samples:
    """See ``ops.ray_marching``.

    Args:
        max_candidates: bound on steps looked up at once; memory, not the result, depends on it.
    """
    origins, directions, jitter = stepped.rays.origins, stepped.rays.directions, stepped.jitter
    radius, step_size = stepped.radius, stepped.step_size
    lower, upper = _occupied_bounds(stepped.occupied, radius, origins)
    t_near, t_far = intersect_box(origins, directions, lower, upper)
    hits = (t_far > t_near).nonzero().squeeze(1)
    if len(hits) == 0:
        return _empty_samples(origins)

    jitter = jitter[hits]
    # One more step at either end: the midpoint decides below, not the rounding of the entry.
    first = (t_near[hits] / step_size - jitter - 0.5).floor().clamp(min=0)
    last = (t_far[hits] / step_size - jitter - 0.5).ceil()
    steps = int((last - first).max()) + 1
    bound = max_candidates or MAX_CANDIDATES.get(origins.device.type, 1 << 25)

    cells = stepped.padded_cells()
    to_cells = (len(cells) - 2) / (2 * radius)
    starts = (origins[hits] + radius) * to_cells + 1
    slopes = directions[hits] * to_cells

    found, counts = [], torch.arange(steps, dtype=first.dtype, device=first.device)
    for rows in torch.arange(len(hits), device=hits.device).split(max(1, bound // steps)):
        t_mids = ((first + jitter)[rows, None] + 0.5 + counts) * step_size
        row, column = _lookup(cells, starts[rows], slopes[rows], t_mids).nonzero(as_tuple=True)
        found.append((rows.index_select(0, row), column))
    ray, column = (torch.cat(parts) for parts in zip(*found, strict=True))
    k = (first + jitter).index_select(0, ray) + column
    return Samples(ray_indices=hits.index_select(0, ray), t_starts=k * step_size, t_ends=(k + 1) * step_size)


def intersect_box(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    lower: Float[Tensor, "3"],
    upper: Float[Tensor, "3"],
) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
    """Distances (entry, exit), entry at least 0; exit <= entry where the ray misses the box."""
    # A ray parallel to a face divides by zero: +-inf are the right answer, 0 / 0 is not.
    safe = torch.where(directions == 0, torch.finfo(directions.dtype).tiny, directions)
    to_lower, to_upper = (lower - origins) / safe, (upper - origins) / safe
    t_near = torch.minimum(to_lower, to_upper).amax(-1).clamp(min=0)
    t_far = torch.maximum(to_lower, to_upper).amin(-1)
    return t_near, t_far


def visible(
    samples: Samples,
    sigmas: Float[Tensor, "N"],
    n_rays: int,
    *,
    alpha_threshold: float | Float[Tensor, ""],
    transmittance_threshold: float = 1e-4,
) -> Bool[Tensor, "N"]:
    """Which samples are seen: dense enough themselves, and not hidden behind others of their ray."""
    alphas = alphas_from_density(sigmas, samples.t_starts, samples.t_ends)
    transmittance = transmittance_from_density(
        sigmas, samples.t_starts, samples.t_ends, samples.ray_indices, n_rays
    )
    return (alphas >= alpha_threshold) & (transmittance >= transmittance_threshold)


def _occupied_bounds(
    occupied: Bool[Tensor, "G G G"] | None, radius: float, like: Tensor
) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """The box around all occupied cells: what lies outside needs no candidates."""
    if occupied is None:
        return like.new_full((3,), -radius), like.new_full((3,), radius)
    size = len(occupied)
    indices = torch.arange(size, device=like.device)
    lower, upper = [], []
    for axis in range(3):
        used = occupied.amax(dim=[other for other in range(3) if other != axis])
        lower.append(torch.where(used, indices, size).amin())
        upper.append(torch.where(used, indices + 1, 0).amax())
    # Half a cell of slack absorbs rounding at the faces.
    cells = torch.stack([torch.stack(lower) - 0.5, torch.stack(upper) + 0.5]).to(like)
    bounds = (cells * (2 * radius / size) - radius).clamp(-radius, radius)
    return bounds[0], bounds[1]


def _lookup(
    cells: Bool[Tensor, "P P P"],
    starts: Float[Tensor, "R 3"],
    slopes: Float[Tensor, "R 3"],
    t_mids: Float[Tensor, "R K"],
) -> Bool[Tensor, "R K"]:
    """The cells at ``starts + t slopes`` (in cells).

    Axis by axis, so that no [R, K, 3] tensor is ever made.
    """
    size = len(cells)
    assert size**3 <= 2**24, "the flat index must be exact in float32"

    def along(axis: int) -> Float[Tensor, "R K"]:
        x = torch.addcmul(starts[:, axis, None], slopes[:, axis, None], t_mids)
        return x.clamp_(0, size - 1).floor_()

    index = along(0)
    for axis in (1, 2):
        index = along(axis).add_(index, alpha=size)
    return cells.flatten().index_select(0, index.to(torch.int32).flatten()).view_as(index)


def _empty_samples(like: Tensor) -> Samples:
    nothing = like.new_zeros(0)
    indices = torch.zeros(0, dtype=torch.long, device=like.device)
    return Samples(ray_indices=indices, t_starts=nothing, t_ends=nothing)
