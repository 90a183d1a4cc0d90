"""What the viewer shows of a scene from a free camera at a moment: colours, opacity, depth, normals, motion.

F = 1 frame of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.files.images import Pixels, depth_range, depth_to_jet, side_by_side, to_pixels
from fourdfy.ops.cameras import cast_rays
from fourdfy.ops.compositing import expected_depth
from fourdfy.types import Cameras, RenderOutput

Render = Callable[[Cameras], RenderOutput]
Truth = Callable[[Cameras], tuple[Tensor, Tensor]]
"""Cameras -> rgb [F, H, W, 3] and opacity [F, H, W, 1], both 0..1: the ground truth of a prompt."""


@dataclass(frozen=True)
class Eye:
    """A camera of the page."""

    c2w: tuple[tuple[float, ...], ...]
    """4 x 4, as ``Cameras.c2w``."""
    fovy_deg: float
    aspect: float
    """Width of the image divided by its height."""

    def cameras(self, moment: float, longer: int, *, halved: bool = False) -> Cameras:
        """One frame at the time ``moment``, lit from the camera.

        Args:
            longer: pixels of the longer side of the whole image.
            halved: only as wide as one of two images side by side.
        """
        height = longer if self.aspect < 1 else max(1, round(longer / self.aspect))
        width = max(1, round(height * self.aspect / (2 if halved else 1)))
        c2w = torch.tensor([self.c2w])
        position = c2w[:, :3, 3]
        distance = position.norm(dim=-1)
        return Cameras(
            c2w=c2w,
            fovy_deg=torch.tensor([self.fovy_deg]),
            elevation_deg=torch.rad2deg(torch.asin((position[:, 2] / distance.clamp(min=1e-6)).clamp(-1, 1))),
            azimuth_deg=torch.rad2deg(torch.atan2(position[:, 1], position[:, 0])),
            distances=distance,
            times=torch.tensor([moment]),
            light_positions=position,
            height=height,
            width=width,
        )


def colours(render: Render, cameras: Cameras) -> Pixels:
    return to_pixels(render(cameras).comp_rgb)[0]


def opacity(render: Render, cameras: Cameras) -> Pixels:
    return to_pixels(render(cameras).opacity)[0]


def depth(render: Render, cameras: Cameras) -> Pixels:
    """The expected depth, near is red; black where there is nothing."""
    frames = render(cameras)
    shown = expected_depth(frames.opacity, frames.depth)
    return depth_to_jet(shown, *depth_range([*shown]))[0]


def normals(render: Render, cameras: Cameras) -> Pixels:
    """World normals, -1..1 as 0..1: the scene's own, or else those of its depth."""
    frames = render(cameras)
    if frames.comp_normal is not None:
        return to_pixels(frames.comp_normal)[0]
    rays = cast_rays(cameras.to(frames.depth.device))
    points = rays.origins + rays.directions * expected_depth(frames.opacity, frames.depth)
    down, right = torch.gradient(points, dim=(1, 2)) if min(points.shape[1:3]) > 1 else (points, points)
    facing = normalize(torch.linalg.cross(down, right, dim=-1), dim=-1)
    return to_pixels((facing + 1) / 2 * (frames.opacity > 0.5))[0]


def motion(render: Render, cameras: Cameras) -> Pixels:
    """Where and how the scene is moved: the displacement's x, y, z around grey, the largest at full strength;
    of a scene without a displacement, how its colours differ from those at time 0."""
    frames = render(cameras)
    if (moved := frames.deformation) is not None:
        return to_pixels(0.5 + 0.5 * moved / moved.abs().amax().clamp(min=1e-6))[0]
    at_rest = render(Cameras(**{**vars(cameras), "times": torch.zeros_like(cameras.times)}))
    return to_pixels((frames.comp_rgb - at_rest.comp_rgb).abs())[0]


VIEWS: dict[str, Callable[[Render, Cameras], Pixels]] = {
    "rgb": colours,
    "opacity": opacity,
    "depth": depth,
    "normals": normals,
    "motion": motion,
}


@torch.no_grad()
def picture(
    view: str, render: Render, eye: Eye, moment: float, longer: int, truth: Truth | None = None
) -> Pixels:
    """A scene as one of ``VIEWS``; with a ``truth``, its colours to the right of it, by the same camera."""
    cameras = eye.cameras(moment, longer, halved=truth is not None)
    ours = VIEWS[view](render, cameras)
    return ours if truth is None else side_by_side([ours, to_pixels(truth(cameras)[0])[0]])
