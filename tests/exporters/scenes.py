"""A coloured ball that is moved about, by a deformation or without one; all in closed form."""

import math

import torch

from fourdfy.exporters.base import TrainedScene
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.scenes.nerf.base import Geometry, Material
from fourdfy.scenes.nerf.scene import NeRFScene
from fourdfy.types import FieldOutput, RenderOutput

RADIUS, SIZE = 2.0, 0.8
GREY, RED = (0.5, 0.5, 0.5), (0.8, 0.2, 0.1)


def moved(points, times):
    """Where a canonical point is seen: stretched along z, twisted about z, and lifted. Rests at 0."""
    stretched = points * torch.cat([torch.ones_like(times), torch.ones_like(times), 1 + 0.3 * times], dim=-1)
    angle = 0.8 * times[:, 0] * stretched[:, 2]
    x, y, z = stretched.unbind(-1)
    turned = [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()]
    return torch.stack([*turned, z + 0.5 * torch.sin(math.pi * times[:, 0])], dim=-1)


def moved_back(points, times):
    """The inverse of ``moved``."""
    x, y, z = points.unbind(-1)
    z = z - 0.5 * torch.sin(math.pi * times[:, 0])
    angle = -0.8 * times[:, 0] * z
    turned = [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()]
    return torch.stack([*turned, z / (1 + 0.3 * times[:, 0])], dim=-1)


class MovedBall(Geometry):
    """Features 1 where the canonical x is above 0.3, else 0."""

    def __init__(self, *, deforms, peak=60.0):
        super().__init__()
        self.deforms, self.peak = deforms, peak
        # The surface is where the radius is SIZE.
        self.cfg = MovedBall.Config(isosurface_resolution=40, isosurface_threshold=30.0)

    @property
    def radius(self):
        return RADIUS

    def dynamic_parameters(self):
        return iter(())

    def density(self, positions, times, *, step):
        return self.peak * torch.sigmoid(25 * (SIZE - moved_back(positions, times).norm(dim=-1)))

    def forward(self, positions, times, *, step, want_normals=False):
        canonical = moved_back(positions, times)
        return FieldOutput(
            sigmas=self.density(positions, times, step=step),
            features=(canonical[:, :1] > 0.3).float(),
            deformation=(canonical - positions) / (2 * RADIUS) if self.deforms else None,
        )


def auto(kind, deforms=False):
    """A geometry whose surface is the one that is seen."""
    geometry = kind(deforms=deforms)
    geometry.cfg = kind.Config(isosurface_resolution=40)
    return geometry


class Painted(Material):
    """Grey in front, red elsewhere."""

    def forward(self, field, points, context):
        return torch.lerp(torch.tensor(RED), torch.tensor(GREY), field.features)


class PlainPictures(NeRFScene):
    """Its pictures are brighter with time, with one depth for each pixel column."""

    def __init__(self, geometry, material):
        torch.nn.Module.__init__(self)
        self.geometry, self.material = geometry, material

    def render(self, cameras, context, budget="image"):
        shape = (len(cameras), cameras.height, cameras.width)
        rgb = cameras.times[:, None, None, None].expand(*shape, 3)
        depth = torch.linspace(2, 4, cameras.width)[:, None].expand(*shape, 1)
        opacity = torch.full_like(depth, 0.8)
        return RenderOutput(comp_rgb=rgb, comp_rgb_fg=0.8 * rgb, depth=0.8 * depth, opacity=opacity)


def make_trained(*, deforms=False, dynamic=True, peak=60.0, geometry=None, material=None):
    geometry = geometry or MovedBall(deforms=deforms, peak=peak)
    azimuth = torch.linspace(0, 90, 6)
    path = orbit_cameras(
        torch.full((6,), 15.0), azimuth, distance=3.0, fovy_deg=40.0,
        times=torch.linspace(0, 1, 6), height=12, width=16,
    )  # fmt: skip

    return TrainedScene(
        scene=PlainPictures(geometry, material or Painted()), prompt="a ball",
        cameras={"test": path, "val_video": path}, dynamic=dynamic, step=7, device=torch.device("cpu"),
    )  # fmt: skip
