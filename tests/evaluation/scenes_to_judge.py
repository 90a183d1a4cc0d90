"""Renderers whose numbers are known, for the tests of metrics."""

from collections.abc import Callable

import torch
from torch import Tensor

from fourdfy.evaluation.views import Protocol, Views
from fourdfy.ops.cameras import cast_rays
from fourdfy.types import Cameras, RenderOutput

RADIUS, GREY = 0.6, 0.5


def views(render: Callable[[Cameras], RenderOutput], *, dynamic: bool = False, **given) -> Views:
    protocol = Protocol(
        **{"size": 48, "views": 24, "frames": 6, "elevation": 0.0} | given.pop("protocol", {})
    )
    return Views(render, protocol, prompt="a ball", distance=3.0, fovy_deg=40.0, dynamic=dynamic, **given)


def ball(
    paint: Callable[[Tensor, Tensor], Tensor] = lambda azimuth, times: torch.full_like(azimuth, 0.9),
    *,
    closer: float = 0.0,
    moved: Callable[[Tensor], Tensor] = lambda times: torch.zeros_like(times),
) -> Callable[[Cameras], RenderOutput]:
    """A ball, moved along z by ``moved(times)`` and painted grey by ``paint(azimuths in radians, times)``;
    depths of the views from behind are ``closer`` than they are."""

    def render(cameras: Cameras) -> RenderOutput:
        rays = cast_rays(cameras)
        centre = torch.zeros(len(cameras), 1, 1, 3)
        centre[..., 2] = moved(cameras.times)[:, None, None]
        to = rays.origins - centre
        b = (to * rays.directions).sum(dim=-1)
        root = b.square() - to.square().sum(dim=-1) + RADIUS**2
        hit = root > 0
        depth = (-b - root.clamp(min=0).sqrt()) * hit
        points = to + rays.directions * depth[..., None]
        azimuth = torch.atan2(points[..., 1], points[..., 0])
        colour = torch.where(hit, paint(azimuth, cameras.times[:, None, None].expand_as(azimuth)), GREY)
        behind = (cameras.c2w[:, 0, 3] < 0)[:, None, None]
        return RenderOutput(
            comp_rgb=colour[..., None].expand(*colour.shape, 3),
            opacity=hit[..., None].float(),
            depth=((depth - closer * behind) * hit)[..., None],
        )

    return render


def faces(*at_deg: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A white ball with a dark face at each of these azimuths."""

    def paint(azimuth: Tensor, times: Tensor) -> Tensor:
        colour = torch.full_like(azimuth, 0.9)
        for at in at_deg:
            near = (azimuth - torch.deg2rad(torch.tensor(at))).cos() > 0.7
            colour = torch.where(near, 0.1, colour)
        return colour

    return paint
