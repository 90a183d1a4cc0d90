"""A scene and a data module for the tests of the viewer."""

from types import SimpleNamespace

import torch
from torch import nn

from fourdfy.ops.cameras import cast_rays, orbit_cameras
from fourdfy.systems.base import System
from fourdfy.types import RenderOutput, StepBatch
from tests.runs import new_run


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

    def __init__(self, static=False):
        self.cfg = SimpleNamespace(static=static)
        zero = torch.zeros(1)
        size = {"height": 8, "width": 8}
        self.camera = orbit_cameras(zero, zero, distance=3.0, fovy_deg=40.0, times=zero, **size)

    def val_cameras(self, dynamic):
        return {"val": self.camera}


class BallSystem(System):
    """A ball that is red at time 0 and green at time 1."""

    __abstractmethods__ = frozenset()

    def __init__(self):
        nn.Module.__init__(self)
        self.cfg = System.Config()
        self.weight, self.step = nn.Parameter(torch.ones(1)), 7
        self.weight.grad = torch.full((1,), 3.0)

    def guidances(self):
        return {"multi_view": None}

    def render(self, cameras):
        return ball(cameras)


def run_of_a_ball(folder, *, static=False):
    """A training of a ball."""
    system = BallSystem()
    optimizer = torch.optim.SGD([{"params": [system.weight], "name": "geometry"}], lr=0.1)
    run = new_run(
        system=system,
        data=OneCamera(static),
        folder=folder,
        label="stage 1/1",
        optimizer=optimizer,
        is_asked_to_stop=lambda: False,
    )
    run.means.add({"loss/multi_view/total": 5.0, "loss/multi_view/sds": 2.0, "multi_view/grad_norm": 4.0})
    return run


def steps(viewer, run, count):
    """Some steps of the run, beside the viewer."""
    for _ in range(count):
        batch = StepBatch(kind="multi_view", cameras=OneCamera().camera, step=run.step)
        run.system.step += 1
        viewer.after_step(run, batch, {})
