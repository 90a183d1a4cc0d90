"""Pinhole cameras around the origin. World: right-handed, z up; azimuth 0 is +x, 90 is +y.

F cameras, H x W pixels. A camera looks along its -z: columns of c2w are right, up, backward, position.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.types import Cameras, RayBundle


def spherical_positions(
    elevation_deg: Float[Tensor, "*F"], azimuth_deg: Float[Tensor, "*F"], distances: Float[Tensor, "*F"]
) -> Float[Tensor, "*F 3"]:
    """Points at ``distances`` (scene units) from the origin; elevations lie in [-90, 90].

    At the poles they are a millionth off the axis, on the side of their azimuth, so that ``look_at`` has
    the limit of the neighbouring elevations: in floats the cosine of 90 degrees is negative.
    """
    elevation, azimuth = torch.deg2rad(elevation_deg), torch.deg2rad(azimuth_deg)
    aside = elevation.cos().clamp(min=1e-6)
    directions = torch.stack([aside * azimuth.cos(), aside * azimuth.sin(), elevation.sin()], dim=-1)
    return distances[..., None] * directions


def look_at(
    positions: Float[Tensor, "F 3"], centers: Float[Tensor, "F 3"], ups: Float[Tensor, "F 3"]
) -> Float[Tensor, "F 4 4"]:
    """c2w of cameras at ``positions`` that look at ``centers``; ``ups`` are neither along that nor zero."""
    look = normalize(centers - positions, dim=-1)
    right = normalize(torch.linalg.cross(look, ups, dim=-1), dim=-1)
    up = normalize(torch.linalg.cross(right, look, dim=-1), dim=-1)
    top = torch.stack([right, up, -look, positions], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(top), 1, 4)
    return torch.cat([top, bottom], dim=1)


def orbit_cameras(
    elevation_deg: Float[Tensor, "F"],
    azimuth_deg: Float[Tensor, "F"],
    *,
    distance: float | Float[Tensor, "F"],
    fovy_deg: float | Float[Tensor, "F"],
    times: Float[Tensor, "F"],
    height: int,
    width: int,
) -> Cameras:
    """Unperturbed cameras that look at the origin, light at the camera."""
    ones = torch.ones_like(azimuth_deg)
    positions = spherical_positions(elevation_deg, azimuth_deg, distance * ones)
    up = torch.tensor([0.0, 0.0, 1.0]).to(positions).expand_as(positions)
    return Cameras(
        c2w=look_at(positions, torch.zeros_like(positions), up),
        fovy_deg=fovy_deg * ones,
        elevation_deg=elevation_deg,
        azimuth_deg=azimuth_deg,
        distances=distance * ones,
        times=times,
        light_positions=positions,
        height=height,
        width=width,
    )


def camera_directions(fovy_deg: Float[Tensor, "F"], height: int, width: int) -> Float[Tensor, "F H W 3"]:
    """Directions through the pixel centres in camera axes, -z ahead, not normalised."""
    focal = 0.5 * height / torch.tan(0.5 * torch.deg2rad(fovy_deg))
    rows = torch.arange(height, dtype=fovy_deg.dtype, device=fovy_deg.device)
    columns = torch.arange(width, dtype=fovy_deg.dtype, device=fovy_deg.device)
    y = -(rows + 0.5 - height / 2) / focal[:, None]
    x = (columns + 0.5 - width / 2) / focal[:, None]
    x, y = x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
    return torch.stack([x, y, -torch.ones_like(x)], dim=-1)


def cast_rays(cameras: Cameras) -> RayBundle:
    """One ray through each pixel centre of each frame."""
    directions = camera_directions(cameras.fovy_deg, cameras.height, cameras.width)
    rotated = torch.einsum("fij,fhwj->fhwi", cameras.c2w[:, :3, :3], directions)
    return RayBundle(
        origins=cameras.c2w[:, None, None, :3, 3].expand_as(rotated),
        directions=normalize(rotated, dim=-1),
        times=cameras.times,
        light_positions=cameras.light_positions,
    )


def projection_matrix(
    fovy_deg: Float[Tensor, "F"], aspect: float, near: float = 0.1, far: float = 1000.0
) -> Float[Tensor, "F 4 4"]:
    """Perspective projection, image y down; ``aspect`` is width / height."""
    tangent = torch.tan(0.5 * torch.deg2rad(fovy_deg))
    matrix = fovy_deg.new_zeros(len(fovy_deg), 4, 4)
    matrix[:, 0, 0] = 1 / (tangent * aspect)
    matrix[:, 1, 1] = -1 / tangent
    matrix[:, 2, 2] = -(far + near) / (far - near)
    matrix[:, 2, 3] = -2 * far * near / (far - near)
    matrix[:, 3, 2] = -1
    return matrix
