"""A scene in closed form: a coloured ball on a circular path, before a plain background."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fourdfy.ops.cameras import cast_rays, orbit_cameras
from fourdfy.scenes.nerf.base import Background, Geometry, Material, Parts
from fourdfy.scenes.nerf.renderer import NeRFVolumeRenderer
from fourdfy.types import FieldOutput, StepContext


class Ball(Geometry):
    """Density falls from ``peak`` to 0 over a soft rim."""

    def __init__(self, peak=40.0, size=0.3, orbit=0.5, sharpness=30.0, extras=False):
        super().__init__()
        self.peak = nn.Parameter(torch.tensor(float(peak)))
        self.orbit = nn.Parameter(torch.tensor(float(orbit)))
        self.color = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
        self.size, self.sharpness, self.extras = size, sharpness, extras
        self.largest_call = self.largest_trained_call = self.trained = 0

    @property
    def radius(self):
        return 1.0

    def dynamic_parameters(self):
        return iter([self.orbit])

    def centers(self, times):
        angle = 2 * math.pi * times
        return self.orbit * torch.cat([angle.cos(), angle.sin(), 0.5 * (2 * angle).sin()], dim=-1)

    def density(self, positions, times, *, step):
        self.largest_call = max(self.largest_call, len(positions))
        inside = self.size - (positions - self.centers(times)).norm(dim=-1)
        return self.peak * torch.sigmoid(self.sharpness * inside)

    def forward(self, positions, times, *, step, want_normals=False):
        if torch.is_grad_enabled():
            self.trained += len(positions)
            self.largest_trained_call = max(self.largest_trained_call, len(positions))
        normals = nn.functional.normalize(positions - self.centers(times), dim=-1)
        return FieldOutput(
            sigmas=self.density(positions, times, step=step),
            features=self.color + positions,
            normals=normals if want_normals else None,
            deformation=self.centers(times) if self.extras else None,
        )


class Paint(Material):
    """The features through a sigmoid; in training darkened by one draw per call."""

    def __init__(self, random=False):
        super().__init__()
        self.random = random

    def forward(self, field, points, context):
        draws = self.random and context.generator is not None
        shade = torch.rand((), generator=context.generator) if draws else 1.0
        return torch.sigmoid(field.features) * shade


class Plain(Background):
    def __init__(self):
        super().__init__()
        self.color = nn.Parameter(torch.tensor([0.2, 0.4, 0.6]))

    def forward(self, directions, *, generator=None):
        return self.color.expand_as(directions)


@dataclass(frozen=True)
class Made:
    scene: Parts
    renderer: NeRFVolumeRenderer


def make_scene(*, kind=NeRFVolumeRenderer, random_material=False, refresh=True, dynamic=True, **settings):
    """A renderer with few samples, its occupancy grid refreshed a few times."""
    geometry_keys = ("peak", "size", "orbit", "sharpness", "extras")
    geometry = Ball(**{key: settings.pop(key) for key in geometry_keys if key in settings})
    scene = Parts(geometry=geometry, material=Paint(random_material), background=Plain())
    settings = {"num_samples_per_ray": 48, "grid_resolution": 16, **settings}
    renderer = kind(kind.Config(**settings), scene)
    if refresh:
        refresh_occupancy(renderer, dynamic=dynamic)
    return Made(scene=scene, renderer=renderer)


def refresh_occupancy(renderer, dynamic=True):
    draws = generator()
    for step in range(0, 160, 16):
        renderer.update_occupancy(StepContext(step, draws), dynamic=dynamic)


def frames(count=3, size=10, dtype=torch.float32):
    """Rays of cameras all around, each at its own time; ``size`` rows and two columns more."""
    cameras = orbit_cameras(
        torch.full((count,), 20.0, dtype=dtype),
        torch.arange(count, dtype=dtype) * 75,
        distance=2.6,
        fovy_deg=45.0,
        times=torch.linspace(0, 0.9, count, dtype=dtype),
        height=size,
        width=size + 2,
    )
    return cast_rays(cameras)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def training(seed=0):
    return StepContext(0, generator(seed))


EVALUATION = StepContext(0)
