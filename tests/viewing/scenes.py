"""A scene and a data module for the tests of the viewer."""

import torch

from fourdfy.ops.cameras import cast_rays, orbit_cameras
from fourdfy.types import RenderOutput


def ball(cameras):
    """A ball of radius 1 that is red at time 0 and green at time 1."""
    rays = cast_rays(cameras)
    along = -(rays.origins * rays.directions).sum(-1, keepdim=True)
    inside = 1 - (rays.origins.square().sum(-1, keepdim=True) - along**2)
    hit = (inside > 0).float()
    depth = (along - inside.clamp(min=0).sqrt()) * hit
    time = cameras.times.view(-1, 1, 1, 1)
    rgb = torch.cat([1 - time, time, 0 * time], -1) * hit
    return RenderOutput(comp_rgb=rgb, opacity=hit, depth=depth)


class OneCamera:
    """A data module that looks from the front."""

    class cfg:
        static = False

    def __init__(self):
        zero = torch.zeros(1)
        size = {"height": 8, "width": 8}
        self.camera = orbit_cameras(zero, zero, distance=3.0, fovy_deg=40.0, times=zero, **size)

    def val_cameras(self, dynamic):
        return {"val": self.camera}
