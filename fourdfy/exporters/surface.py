"""The surface of a scene at a moment, with the colours that a camera straight above it sees.

V vertices, T triangles, N points, K samples of a ray. Positions are in scene units.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.config import ConfigError
from fourdfy.exporters.base import TrainedScene
from fourdfy.ops.compositing.reference import accumulate, weights_from_density
from fourdfy.ops.isosurface import (
    decimated,
    in_chunks,
    marching_cubes,
    optical_depth,
    sample_grid,
    silhouette_level,
    smoothed,
    vertex_normals,
    without_ripples,
    without_small_parts,
)
from fourdfy.scenes.base import IsosurfaceConfig

logger = logging.getLogger(__name__)

FOG_SMOOTHING = 0.25
"""Width of the density's blur, in units of the depth to which light enters. Dense scenes stay sharp."""
COLOR_STEP = 0.04
"""Ten of 255 levels: a visible change of colour."""
COLOR_REACH, COLOR_SAMPLES = 0.05, 12
"""A surface's colour is composited over this share of the radius before and behind it."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Triangles, counter-clockwise from outside."""

    positions: Float[Tensor, "V 3"]
    faces: Int[Tensor, "T 3"]
    normals: Float[Tensor, "V 3"]
    """Unit, outward."""


class NoSurfaceError(ConfigError):
    """Nothing is visible at this moment."""


@torch.no_grad()
def extract_surface(
    trained: TrainedScene, time: float, *, resolution: int | None = None, smoothing: int = 0
) -> Surface:
    """The isosurface at scene time ``time``.

    Of a given threshold it is the isosurface as it is. With ``auto``, ripples of the density that no camera
    sees are smoothed away, and regions that no camera sees into are solid. Otherwise thin parts of a shell
    with a hollow behind it, such as a dark pupil, would be holes, and the hollow would have its own surface.

    Args:
        resolution: takes the place of ``isosurface_resolution``.
        smoothing: iterations of ``without_ripples``.

    Raises:
        NoSurfaceError: no density reaches the threshold; says how dense the scene is.
    """
    volume = trained.volume
    settings, radius = volume.isosurface, volume.radius

    def density(positions: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        return volume.density(positions, torch.full_like(positions[:, :1], time), step=trained.step)

    grid = sample_grid(
        density,
        radius=radius,
        resolution=resolution or settings.isosurface_resolution,
        chunk_size=settings.isosurface_chunk or 1 << 17,
        device=trained.device,
    )
    level = _level(grid, grid, settings, radius, time)
    solid = grid / level
    if settings.isosurface_threshold == "auto":
        # Light enters a fog of density s to a depth of about 1 / s. Finer detail is invisible to a camera,
        # but would be crevices in a mesh.
        fog = smoothed(grid, radius, FOG_SMOOTHING / level)
        level = _level(fog, grid, settings, radius, time)
        solid = (fog / level).maximum(optical_depth(grid, radius) / math.log(2))
    positions, faces = marching_cubes(solid, 1.0, radius)
    if settings.isosurface_remove_outliers:
        positions, faces = without_small_parts(
            positions, faces, settings.isosurface_outlier_n_faces_threshold
        )
    positions = without_ripples(positions, faces, smoothing).clamp(-radius, radius)
    logger.info("surface at time %.3g: density %.3g, %d triangles", time, level, len(faces))
    return Surface(positions=positions, faces=faces, normals=vertex_normals(positions, faces))


def _level(
    grid: Float[Tensor, "R R R"],
    seen: Float[Tensor, "R R R"],
    settings: IsosurfaceConfig,
    radius: float,
    time: float,
) -> float:
    auto = settings.isosurface_threshold == "auto"
    level = silhouette_level(grid, radius, seen) if auto else float(settings.isosurface_threshold)
    low, high = float(grid.min()), float(grid.max())
    if level is None or not low < level < high:
        raise NoSurfaceError(
            f"system.geometry.isosurface_threshold={settings.isosurface_threshold}: no surface at time "
            f"{time:g}, where the density runs from {low:.3g} to {high:.3g}; give a number between, "
            f"or auto for what a camera sees"
        )
    return level


def simplified(surface: Surface, most: int, colors: Float[Tensor, "V 3"] | None = None) -> Surface:
    """The surface with about ``most`` triangles.

    If its vertices carry ``colors``, triangles across which these change stay as they are.
    """
    if colors is None:
        varied = torch.zeros_like(surface.faces[:, 0], dtype=torch.bool)
    else:
        corners = colors[surface.faces]
        varied = (corners.amax(1) - corners.amin(1)).amax(-1) > COLOR_STEP
    positions, faces = decimated(surface.positions, surface.faces, most, varied)
    return Surface(positions=positions, faces=faces, normals=vertex_normals(positions, faces))


@torch.no_grad()
def surface_colors(
    trained: TrainedScene, positions: Float[Tensor, "N 3"], normals: Float[Tensor, "N 3"], time: float
) -> Float[Tensor, "N 3"]:
    """Displayed colours, 0..1, as seen by a camera above each point, in the direction of its normal.

    The point's own colour is not enough, because a soft surface shows what lies a little deeper. Materials
    that shade are lit from the camera, so that the result is the albedo under full light.
    """
    reach = COLOR_REACH * trained.volume.radius
    rays = torch.cat([positions, normals], dim=-1)
    return in_chunks(lambda some: _colors_from_above(trained, some, reach, time), rays, 1 << 14)


def _colors_from_above(
    trained: TrainedScene, rays: Float[Tensor, "n 6"], reach: float, time: float
) -> Float[Tensor, "n 3"]:
    points, normals = rays.split(3, dim=-1)
    edges = torch.linspace(-reach, reach, COLOR_SAMPLES + 1, device=rays.device)
    starts, ends = edges[:-1].repeat(len(rays)), edges[1:].repeat(len(rays))
    ray_indices = torch.arange(len(rays), device=rays.device).repeat_interleave(COLOR_SAMPLES)
    samples = points[ray_indices] - (starts + ends)[:, None] / 2 * normals[ray_indices]
    # No ray is marched outside of the scene's cube, so nothing there was learned.
    is_inside = (samples.abs() <= trained.volume.radius + 1e-6).all(dim=-1)
    sigmas, colors = trained.volume.radiance(
        samples, torch.full_like(samples[:, :1], time), -normals[ray_indices], step=trained.step
    )
    weights = weights_from_density(sigmas * is_inside, starts, ends, ray_indices, len(rays))
    total = accumulate(weights, torch.ones_like(weights)[:, None], ray_indices, len(rays))
    mixed = accumulate(weights, colors, ray_indices, len(rays)) / total.clamp(min=1e-6)
    return mixed.clamp(0, 1)
