"""Isosurfaces: from a density to triangles (Lorensen & Cline 1987), and back through a deformation.

R samples along each axis of the cube [-radius, radius]^3, both ends included; V vertices, T
triangles, N points. Positions are in scene units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], rows: Float[Tensor, "N C"], size: int) -> Tensor:
    """``function(rows)``, called on at most ``size`` rows at once, without a graph."""
    return torch.cat([function(some) for some in rows.split(size)])


def sample_grid(
    density: Callable[[Tensor], Tensor],
    *,
    radius: float,
    resolution: int,
    chunk_size: int,
    device: torch.device,
) -> Float[Tensor, "R R R"]:
    """A function of points, one number each, on the cube's grid; axes are x, y, z."""
    axis = torch.linspace(-radius, radius, resolution, device=device)
    points = torch.cartesian_prod(axis, axis, axis)
    return in_chunks(density, points, chunk_size).view(resolution, resolution, resolution)


def silhouette_level(
    grid: Float[Tensor, "R R R"], radius: float, seen: Float[Tensor, "R R R"] | None = None
) -> float | None:
    """The level at which the grid's isosurface has the silhouettes that volume rendering shows.

    Parallel rays along each axis see a pixel as covered where their opacity passes 1/2, and see the
    isosurface where the largest value on the ray exceeds its level. The level with the greatest
    intersection over union of the two, all axes together; None where no ray is covered.

    Args:
        seen: the densities that are rendered, where ``grid`` is a smoothed copy of them.
    """
    seen, spacing = grid if seen is None else seen, 2 * radius / (len(grid) - 1)
    covered = torch.cat([1 - torch.exp(-seen.sum(axis) * spacing) > 0.5 for axis in range(3)]).flatten()
    if not covered.any():
        return None
    peaks, order = torch.cat([grid.amax(axis) for axis in range(3)]).flatten().sort(descending=True)
    hits = covered[order].cumsum(0)
    above = torch.arange(1, len(peaks) + 1, device=grid.device)
    # A level lies between two peaks; equal ones cannot be distinguished.
    apart = torch.cat([peaks[:-1] > peaks[1:], peaks[-1:] > 0])
    overlap = torch.where(apart, hits / (above + covered.sum() - hits), -1.0)
    last = int(overlap.argmax())
    below = peaks[last + 1] if last + 1 < len(peaks) else peaks.new_zeros(())
    return float((peaks[last] + below) / 2)


def optical_depth(grid: Float[Tensor, "R R R"], radius: float) -> Float[Tensor, "R R R"]:
    """Optical depth between a point and the outside, along the least covered of the grid's 26 directions.

    If it is above log 2, no camera in these directions receives half of the point's light.
    """
    spacing = 2 * radius / (len(grid) - 1)
    least = torch.full_like(grid, torch.inf)
    for direction in itertools.product((-1, 0, 1), repeat=3):
        if any(direction):
            length = spacing * math.hypot(*direction)
            least = torch.minimum(least, length * _sums_from_outside(grid, direction))
    return least


def _sums_from_outside(grid: Float[Tensor, "R R R"], direction: tuple[int, ...]) -> Tensor:
    """At every point, the sum of half of its own value and of all values before it along ``direction``,
    starting outside the grid."""
    main = next(axis for axis, step in enumerate(direction) if step)
    across = tuple(step for axis, step in enumerate(direction) if axis != main)
    slices = list(grid.unbind(main))[:: direction[main]]
    before, sums = torch.zeros_like(slices[0]), []
    for values in slices:
        sums.append(before + values / 2)
        before = _shifted(before + values, across)
    return torch.stack(sums[:: direction[main]], dim=main)


def _shifted(plane: Float[Tensor, "R R"], steps: tuple[int, ...]) -> Float[Tensor, "R R"]:
    """The grid shifted by whole cells, filled up with zeros."""
    for axis, step in enumerate(steps):
        if step:
            plane = plane.roll(step, axis)
            plane.select(axis, 0 if step > 0 else -1).zero_()
    return plane


def smoothed(grid: Float[Tensor, "R R R"], radius: float, std: float) -> Float[Tensor, "R R R"]:
    """The grid convolved with a Gaussian of ``std`` scene units."""
    from scipy.ndimage import gaussian_filter

    cells = std * (len(grid) - 1) / (2 * radius)
    return torch.from_numpy(gaussian_filter(grid.cpu().numpy(), cells, mode="nearest")).to(grid)


def marching_cubes(
    grid: Float[Tensor, "R R R"], level: float, radius: float
) -> tuple[Float[Tensor, "V 3"], Int[Tensor, "T 3"]]:
    """The surface where the density is ``level``: vertices inside the cube, and triangles wound
    counter-clockwise as seen from outside. The surface is closed: where the density reaches the
    cube's side, the side is the surface.

    Raises:
        ValueError: ``level`` is not between the grid's extremes, so there is no surface.
    """
    from skimage.measure import marching_cubes as lorensen

    low, high = float(grid.min()), float(grid.max())
    if not low < level < high:
        raise ValueError(f"no surface at level {level:g}: the density runs from {low:g} to {high:g}")
    spacing = 2 * radius / (len(grid) - 1)
    padded = np.pad(grid.detach().float().cpu().numpy(), 1, constant_values=min(low, 0.0))
    # ascent: the library winds by the left hand otherwise.
    vertices, faces, _, _ = lorensen(
        padded, level, spacing=(spacing,) * 3, gradient_direction="ascent", allow_degenerate=False
    )
    positions = torch.from_numpy(vertices.copy()) - (radius + spacing)
    return positions.clamp(-radius, radius).to(grid), torch.from_numpy(faces.astype(np.int64)).to(grid.device)


def without_small_parts(
    positions: Float[Tensor, "V 3"], faces: Int[Tensor, "T 3"], share: float
) -> tuple[Float[Tensor, "v 3"], Int[Tensor, "t 3"]]:
    """The mesh without connected parts of fewer triangles than ``share`` of the largest part's."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    corners = faces.cpu().numpy()
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]]])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(positions), len(positions)))
    _, part_of_vertex = connected_components(graph, directed=False)
    part = part_of_vertex[corners[:, 0]]
    sizes = np.bincount(part)
    kept = faces[torch.from_numpy(sizes[part] >= share * sizes.max()).to(faces.device)]
    used, kept = kept.unique(return_inverse=True)
    return positions[used], kept


def decimated(
    positions: Float[Tensor, "V 3"], faces: Int[Tensor, "T 3"], most: int, keep: Bool[Tensor, "T"]
) -> tuple[Float[Tensor, "v 3"], Int[Tensor, "t 3"]]:
    """The mesh with about ``most`` triangles, by quadric error (Garland & Heckbert 1997).

    Triangles to ``keep`` stay as they are, even if they are more than that. Of those that touch none of
    these, at least their share of ``most`` is left, as fewer would lose the shape.
    """
    from fast_simplification import simplify

    if len(faces) <= most or keep.all():
        return positions, faces
    used, loose = faces[~keep].unique(return_inverse=True)
    inner = int((~torch.isin(faces[~keep], faces[keep])).all(1).sum())
    fewest = len(loose) - inner + inner * most // len(faces)
    few, few_faces = simplify(
        positions[used].cpu().numpy(),
        loose.cpu().numpy(),
        target_count=min(len(loose), max(4, most - int(keep.sum()), fewest)),
        preserve_border=True,
    )
    corners = torch.from_numpy(few).to(positions)[torch.from_numpy(few_faces).to(faces)]
    # The border has not moved, so that the two parts meet in the very same positions.
    corners = torch.cat([positions[faces[keep]], corners]).flatten(0, 1)
    positions, corner = corners.unique(dim=0, return_inverse=True)
    return positions, corner.view(-1, 3)


def without_ripples(
    positions: Float[Tensor, "V 3"], faces: Int[Tensor, "T 3"], iterations: int
) -> Float[Tensor, "V 3"]:
    """The vertices after Taubin's smoothing (1995), which removes detail as fine as the triangles without
    shrinking or growing the shape."""
    neighbours = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    neighbours = torch.cat([neighbours, neighbours.flip(1)]).unique(dim=0)
    here, there = neighbours.unbind(1)
    counts = torch.bincount(here, minlength=len(positions)).clamp(min=1)[:, None]
    for _ in range(iterations):
        for weight in (0.5, -0.53):
            means = torch.zeros_like(positions).index_add(0, here, positions[there]) / counts
            positions = torch.lerp(positions, means, weight)
    return positions


def vertex_normals(positions: Float[Tensor, "V 3"], faces: Int[Tensor, "T 3"]) -> Float[Tensor, "V 3"]:
    """Unit normals, the mean of the triangles around a vertex by area."""
    a, b, c = positions[faces].unbind(1)
    doubled_areas = torch.linalg.cross(b - a, c - a, dim=-1)
    normals = torch.zeros_like(positions).index_add(
        0, faces.flatten(), doubled_areas.repeat_interleave(3, dim=0)
    )
    return normalize(normals, dim=-1)


@torch.no_grad()
def invert_warp(
    displacement: Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 3"]],
    targets: Float[Tensor, "N 3"],
    guess: Float[Tensor, "N 3"],
    *,
    tolerance: float,
    max_iterations: int = 30,
) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N"]]:
    """Points p with ``p + displacement(p) = targets``, and their residuals.

    A deformation field maps backwards: from a point seen at some time to the canonical scene. Where a
    canonical point is seen is the root of that map, found here by Broyden's method (Broyden 1965) for
    all points at once, starting from ``guess`` with the identity as the Jacobian, so that the first
    step is that of a fixed-point iteration. A point that does not converge gets its best estimate.

    Args:
        tolerance: a residual below it is good enough, in scene units.

    Returns:
        The points, and the lengths of ``targets - p - displacement(p)``.
    """
    points = guess
    gaps = points + displacement(points) - targets
    inverse = torch.eye(3).to(guess).repeat(len(guess), 1, 1)
    best_points, best = points, gaps.norm(dim=-1)
    for _ in range(max_iterations):
        if not (best > tolerance).any():
            break
        steps = -(inverse @ gaps[:, :, None])[..., 0]
        points = points + steps
        new_gaps = points + displacement(points) - targets
        predicted = (inverse @ (new_gaps - gaps)[:, :, None])[..., 0]
        denominator = (steps * predicted).sum(-1, keepdim=True)
        usable = denominator.abs() > 1e-12  # a point that has not moved gives no information
        correction = torch.where(usable, (steps - predicted) / torch.where(usable, denominator, 1.0), 0.0)
        inverse = inverse + correction[:, :, None] * (steps[:, None] @ inverse)
        gaps = new_gaps
        lengths = gaps.norm(dim=-1)
        better: Bool[Tensor, "N"] = lengths < best
        best_points = torch.where(better[:, None], points, best_points)
        best = torch.where(better, lengths, best)
    return best_points, best
