"""Ground truth of the shapes world: analytic animated objects in the box [-1, 1]^3.

F frames (a prompt, a camera and a moment each), H x W pixels, R rays of a frame, K slabs.
All objects are convex, so a ray's interval inside one is an intersection of intervals in closed form.
Distances t along a ray are in scene units; the object's own axes have its front at +x and z up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fourdfy.ops.cameras import cast_rays, orbit_cameras
from fourdfy.shapes.grammar import COLOURS, MOTIONS, SHAPES, ShapePrompt
from fourdfy.types import Cameras

CAMERA_DISTANCE = 3.0
FOVY_DEG = 40.0
IMAGE_SIZE = 64

BACKGROUNDS = ((0.8, 0.8, 0.8), (0.15, 0.15, 0.2))
"""The plain backgrounds that the models know: light grey and dark."""

COLOUR_RGB = {
    "red": (0.88, 0.10, 0.12),
    "green": (0.12, 0.68, 0.18),
    "blue": (0.12, 0.28, 0.92),
    "yellow": (0.96, 0.88, 0.10),
    "purple": (0.55, 0.14, 0.78),
    "orange": (0.98, 0.50, 0.06),
}
EYE_WHITE = (0.98, 0.98, 0.98)
PUPIL = (0.04, 0.04, 0.06)
EYE_RADIUS_DEG = 35.0
"""Directions from the object's centre within this angle of its front axis are the front mark."""
PUPIL_RADIUS_DEG = 15.0

BALL_RADIUS = 0.45
CUBE_HALF = 0.36
CONE_TOP, CONE_BASE, CONE_RADIUS = 0.52, -0.40, 0.44
CYLINDER_RADIUS, CYLINDER_HALF = 0.28, 0.46
DIAMOND_RADIUS, DIAMOND_HALF = 0.42, 0.58

_EPS = 1e-9

Rays = Float[Tensor, "F R 3"]
PerRay = Float[Tensor, "F R"]


def encode_prompts(prompts: Sequence[ShapePrompt]) -> Int[Tensor, "F 3"]:
    """Indices of colour, shape and motion."""
    codes = [[COLOURS.index(p.colour), SHAPES.index(p.shape), MOTIONS.index(p.motion)] for p in prompts]
    return torch.tensor(codes, dtype=torch.long).reshape(-1, 3)


def pose(
    prompt: ShapePrompt | Sequence[ShapePrompt], times: Float[Tensor, "F"]
) -> tuple[Float[Tensor, "F 3"], Float[Tensor, "F"], Float[Tensor, "F"]]:
    """Offset (scene units), scale and yaw (radians, counter-clockwise from above) at ``times``.

    Periodic in time with period 1; the rest pose (0, 1, 0) at t = 0.
    """
    prompts = [prompt] * len(times) if isinstance(prompt, ShapePrompt) else prompt
    return pose_from_codes(encode_prompts(prompts)[:, 2].to(times.device), times)


def pose_from_codes(
    motion: Int[Tensor, "F"], times: Float[Tensor, "F"]
) -> tuple[Float[Tensor, "F 3"], Float[Tensor, "F"], Float[Tensor, "F"]]:
    """``pose`` for indices into MOTIONS."""
    is_motion = {name: motion == k for k, name in enumerate(MOTIONS)}
    bump = torch.sin(math.pi * times).square()
    zero = torch.zeros_like(times)
    height = torch.where(is_motion["bouncing"], 0.4 * bump, zero)
    aside = torch.where(is_motion["sliding"], 0.4 * torch.sin(2 * math.pi * times), zero)
    scale = torch.where(is_motion["pulsing"], 1 + 0.45 * bump, zero + 1)
    yaw = torch.where(is_motion["spinning"], 2 * math.pi * times, zero)
    return torch.stack([zero, aside, height], dim=-1), scale, yaw


def orbit(
    elevation_deg: Float[Tensor, "F"],
    azimuth_deg: Float[Tensor, "F"],
    times: Float[Tensor, "F"],
    size: int = IMAGE_SIZE,
) -> Cameras:
    """Square cameras at the distance and with the angle of view that the models know."""
    return orbit_cameras(
        elevation_deg,
        azimuth_deg,
        distance=CAMERA_DISTANCE,
        fovy_deg=FOVY_DEG,
        times=times,
        height=size,
        width=size,
    )


def render(
    prompts: Sequence[ShapePrompt],
    cameras: Cameras,
    background: Float[Tensor, "F 3"] | Float[Tensor, "3"],
    *,
    supersample: int = 2,
) -> tuple[Float[Tensor, "F H W 3"], Float[Tensor, "F H W 1"]]:
    """Images (0..1, over ``background``) and opacity of one prompt per frame, in the cameras' dtype.

    Shading is baked and does not depend on the view. ``supersample``^2 rays per pixel.
    """
    if len(prompts) != len(cameras):
        raise ValueError(f"{len(prompts)} prompts for {len(cameras)} cameras; give one for each frame")
    return render_codes(encode_prompts(prompts), cameras, background, supersample=supersample)


def render_codes(
    codes: Int[Tensor, "F 3"],
    cameras: Cameras,
    background: Float[Tensor, "F 3"] | Float[Tensor, "3"],
    *,
    supersample: int = 2,
) -> tuple[Float[Tensor, "F H W 3"], Float[Tensor, "F H W 1"]]:
    """``render`` for ``encode_prompts`` indices; keep them on the CPU, where frames are sorted by shape."""
    height, width = cameras.height, cameras.width
    fine = replace(cameras, height=height * supersample, width=width * supersample)
    background = background.to(cameras.c2w).expand(len(cameras), 3)
    rgb = cameras.c2w.new_empty(len(cameras), height, width, 3)
    opacity = cameras.c2w.new_empty(len(cameras), height, width, 1)
    shapes = codes[:, 1].cpu()
    for shape in shapes.unique().tolist():
        frames = (shapes == shape).nonzero()[:, 0].to(rgb.device)
        some = fine[frames]
        some_codes = codes.to(rgb.device)[frames]
        colour, alpha = _render_one_shape(SHAPES[shape], some_codes[:, 0], some_codes[:, 2], some)
        colour = colour + (1 - alpha) * background[frames, None, None, :]
        rgb[frames], opacity[frames] = _shrink(colour, supersample), _shrink(alpha, supersample)
    return rgb, opacity


def _render_one_shape(
    shape: str, colour: Int[Tensor, "F"], motion: Int[Tensor, "F"], cameras: Cameras
) -> tuple[Float[Tensor, "F H W 3"], Float[Tensor, "F H W 1"]]:
    """Premultiplied colour and opacity, one ray per pixel."""
    rays = cast_rays(cameras)
    offset, scale, yaw = pose_from_codes(motion, cameras.times)
    origins = _to_object(cameras.c2w[:, :3, 3] - offset, yaw) / scale[:, None]
    directions = _to_object(rays.directions.flatten(1, 2), yaw) / scale[:, None, None]
    origins = origins[:, None, :].expand_as(directions)
    t_near, t_far, normal_z = _INTERSECT[shape](origins, directions)
    hit = (t_near < t_far) & (t_near > 0)
    points = origins + torch.where(hit, t_near, 0.0)[..., None] * directions
    front = points[..., 0] / points.square().sum(-1).clamp_min(_EPS).sqrt()
    palette = torch.tensor([COLOUR_RGB[name] for name in COLOURS]).to(points)
    body = palette[colour][:, None, :] * (0.75 + 0.25 * normal_z[..., None])
    eye = points.new_tensor(EYE_WHITE)
    pupil = points.new_tensor(PUPIL)
    rgb = torch.where((front > math.cos(math.radians(EYE_RADIUS_DEG)))[..., None], eye, body)
    rgb = torch.where((front > math.cos(math.radians(PUPIL_RADIUS_DEG)))[..., None], pupil, rgb)
    alpha = hit.to(points.dtype)[..., None]
    size = (len(cameras), cameras.height, cameras.width, -1)
    return (rgb * alpha).view(size), alpha.view(size)


def _to_object(vectors: Float[Tensor, "F *R 3"], yaw: Float[Tensor, "F"]) -> Float[Tensor, "F *R 3"]:
    """World vectors in the axes of an object turned by ``yaw``."""
    cos, sin = (part.view(-1, *[1] * (vectors.ndim - 2)) for part in (yaw.cos(), yaw.sin()))
    x, y, z = vectors.unbind(-1)
    return torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1)


def _ball(origins: Rays, directions: Rays) -> tuple[PerRay, PerRay, PerRay]:
    """Distances of entry and exit (entry beyond exit: missed) and z of the unit normal at entry."""
    squared = directions.square().sum(-1)
    half_b = (origins * directions).sum(-1)
    root, missed = _root(half_b.square() - squared * (origins.square().sum(-1) - BALL_RADIUS**2))
    t_near, t_far = (-half_b - root) / squared, (-half_b + root) / squared
    normal_z = (origins[..., 2] + t_near * directions[..., 2]) / BALL_RADIUS
    return t_near + missed, t_far, normal_z


def _slabs(origins: Rays, directions: Rays, planes: Float[Tensor, "K 3"]) -> tuple[PerRay, PerRay, PerRay]:
    """The solid |p . plane| <= 1 for all K planes."""
    origin_dots, direction_dots = origins @ planes.T, _nonzero(directions @ planes.T)
    centre, half = -origin_dots / direction_dots, 1 / direction_dots.abs()
    t_near, which = (centre - half).max(dim=-1)
    t_far = (centre + half).amin(dim=-1)
    normals_z = planes[:, 2] / planes.norm(dim=-1)
    sign = direction_dots.gather(-1, which[..., None])[..., 0].sign()
    return t_near, t_far, -sign * normals_z[which]


def _cube(origins: Rays, directions: Rays) -> tuple[PerRay, PerRay, PerRay]:
    return _slabs(origins, directions, torch.eye(3).to(origins) / CUBE_HALF)


def _diamond(origins: Rays, directions: Rays) -> tuple[PerRay, PerRay, PerRay]:
    a, h = 1 / DIAMOND_RADIUS, 1 / DIAMOND_HALF
    planes = origins.new_tensor([[a, 0, h], [a, 0, -h], [0, a, h], [0, a, -h]])
    return _slabs(origins, directions, planes)


def _cylinder(origins: Rays, directions: Rays) -> tuple[PerRay, PerRay, PerRay]:
    squared = directions[..., :2].square().sum(-1).clamp_min(_EPS)
    half_b = (origins[..., :2] * directions[..., :2]).sum(-1)
    root, missed = _root(half_b.square() - squared * (origins[..., :2].square().sum(-1) - CYLINDER_RADIUS**2))
    side_near, side_far = (-half_b - root) / squared + missed, (-half_b + root) / squared
    cap_near, cap_far = _between_caps(origins, directions, -CYLINDER_HALF, CYLINDER_HALF)
    normal_z = torch.where(side_near > cap_near, 0.0, -directions[..., 2].sign())
    return torch.maximum(side_near, cap_near), torch.minimum(side_far, cap_far), normal_z


def _cone(origins: Rays, directions: Rays) -> tuple[PerRay, PerRay, PerRay]:
    slope = CONE_RADIUS / (CONE_TOP - CONE_BASE)
    below, down = CONE_TOP - origins[..., 2], directions[..., 2]
    # x^2 + y^2 <= (slope * (top - z))^2; its upper nappe is cut away by the caps below.
    a = _nonzero(directions[..., :2].square().sum(-1) - slope**2 * down.square())
    half_b = (origins[..., :2] * directions[..., :2]).sum(-1) + slope**2 * below * down
    c = origins[..., :2].square().sum(-1) - slope**2 * below.square()
    root, missed = _root(half_b.square() - a * c)
    first, last = (-half_b - root) / a, (-half_b + root) / a  # in order where a > 0
    # A ray steeper than the flank (a < 0) is inside outside its roots: one nappe on either end.
    far_away = torch.full_like(a, 1e6)
    steep_near = torch.where(down < 0, first, -far_away)
    steep_far = torch.where(down < 0, far_away, last)
    side_near = torch.where(a > 0, first, steep_near) + missed
    side_far = torch.where(a > 0, last, steep_far)
    cap_near, cap_far = _between_caps(origins, directions, CONE_BASE, CONE_TOP)
    flank = slope / math.sqrt(1 + slope**2)
    normal_z = torch.where(side_near > cap_near, flank, -down.sign())
    return torch.maximum(side_near, cap_near), torch.minimum(side_far, cap_far), normal_z


_INTERSECT: dict[str, Callable[[Rays, Rays], tuple[PerRay, PerRay, PerRay]]] = {
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "cylinder": _cylinder,
    "diamond": _diamond,
}


def _between_caps(origins: Rays, directions: Rays, low: float, high: float) -> tuple[PerRay, PerRay]:
    down = _nonzero(directions[..., 2])
    to_low, to_high = (low - origins[..., 2]) / down, (high - origins[..., 2]) / down
    return torch.minimum(to_low, to_high), torch.maximum(to_low, to_high)


def _root(discriminant: PerRay) -> tuple[PerRay, PerRay]:
    """Its root, and a distance to add to the entry: 0, or far beyond any exit where there is no root."""
    missed = torch.where(discriminant > 0, 0.0, 1e6).to(discriminant.dtype)
    return discriminant.clamp_min(0).sqrt(), missed


def _nonzero(values: Float[Tensor, "*F"]) -> Float[Tensor, "*F"]:
    return torch.where(values.abs() < _EPS, _EPS, values)


def _shrink(images: Float[Tensor, "F H W C"], factor: int) -> Float[Tensor, "F h w C"]:
    if factor == 1:
        return images
    return avg_pool2d(images.movedim(-1, 1), factor).movedim(1, -1)
