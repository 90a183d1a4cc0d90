"""The ground truth of the shapes world."""

import math

import pytest
import torch

from fourdfy.ops.cameras import cast_rays
from fourdfy.shapes import world
from fourdfy.shapes.grammar import MOTIONS, SHAPES, ShapePrompt
from fourdfy.shapes.world import BACKGROUNDS, COLOUR_RGB, orbit, pose, render

GREY = torch.tensor(BACKGROUNDS[0])


def cameras(azimuths, times, elevation=10.0, size=32, dtype=torch.float32):
    azimuth = torch.tensor(azimuths, dtype=dtype)
    return orbit(torch.full_like(azimuth, elevation), azimuth, torch.tensor(times, dtype=dtype), size)


def contains(prompt, points, times):
    """1 where a world point is inside the object at its moment, else 0: the definition of the shapes."""
    offset, scale, yaw = pose(prompt, times)
    x, y, z = (points - offset).unbind(-1)
    x, y = yaw.cos() * x + yaw.sin() * y, yaw.cos() * y - yaw.sin() * x
    x, y, z = (axis / scale for axis in (x, y, z))
    radius = torch.hypot(x, y)
    inside = {
        "ball": torch.hypot(radius, z) <= world.BALL_RADIUS,
        "cube": torch.stack([x, y, z]).abs().amax(0) <= world.CUBE_HALF,
        "cone": (z >= world.CONE_BASE)
        & (radius * (world.CONE_TOP - world.CONE_BASE) <= world.CONE_RADIUS * (world.CONE_TOP - z)),
        "cylinder": (z.abs() <= world.CYLINDER_HALF) & (radius <= world.CYLINDER_RADIUS),
        "diamond": torch.maximum(x.abs(), y.abs()) / world.DIAMOND_RADIUS + z.abs() / world.DIAMOND_HALF <= 1,
    }
    return inside[prompt.shape].to(points.dtype)


def pupil_share(shape, motion, azimuths, times):
    """Share of dark pixels of each frame."""
    rgb, _ = render([ShapePrompt("red", shape, motion)] * len(times), cameras(azimuths, times), GREY)
    return (rgb.amax(-1) < 0.2).float().mean(dim=(1, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_front_mark_is_seen_from_the_front_only(shape):
    share = pupil_share(shape, "standing still", [0.0, 120.0, 180.0, 240.0], [0.0] * 4)
    assert share[0] > 0.001
    assert (share[1:] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_spinning_turns_the_front_to_azimuth_90_after_a_quarter(shape):
    share = pupil_share(shape, "spinning", [0.0, 90.0, 180.0, 270.0], [0.25] * 4)
    assert share[1] > 0.001
    assert share[[0, 2, 3]].sum() == 0


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_starts_at_rest_and_is_periodic(motion):
    offset, scale, yaw = pose(
        ShapePrompt("red", "cube", motion), torch.tensor([0.0, 1.0], dtype=torch.float64)
    )
    assert offset.abs().max() < 1e-12
    assert (scale - 1).abs().max() < 1e-12
    assert torch.remainder(yaw, 2 * math.pi).abs().max() < 1e-12


def test_poses_are_what_the_motions_say():
    times = torch.tensor([0.25, 0.5])
    assert torch.allclose(
        pose(ShapePrompt("red", "cube", "bouncing"), times)[0][:, 2], torch.tensor([0.2, 0.4])
    )
    assert torch.allclose(pose(ShapePrompt("red", "cube", "sliding"), times)[0][0, 1], torch.tensor(0.4))
    assert torch.allclose(pose(ShapePrompt("red", "cube", "pulsing"), times)[1], torch.tensor([1.225, 1.45]))


def test_bouncing_rises_in_the_image():
    _, opacity = render([ShapePrompt("blue", "ball", "bouncing")] * 2, cameras([0.0] * 2, [0.0, 0.5]), GREY)
    rows = torch.arange(32.0)[:, None]
    low, high = ((o[..., 0] * rows).sum() / o.sum() for o in opacity)
    assert high < low - 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", ["spinning", "pulsing"])
def test_silhouettes_agree_with_dense_marching(shape, motion):
    prompt = ShapePrompt("green", shape, motion)
    views = cameras([20.0, 250.0], [0.1, 0.4], elevation=28.0, size=16, dtype=torch.float64)
    _, opacity = render([prompt] * 2, views, GREY, supersample=1)
    rays, distances = cast_rays(views), torch.linspace(1.8, 4.2, 800, dtype=torch.float64)
    points = rays.origins[..., None, :] + distances[:, None] * rays.directions[..., None, :]
    times = views.times[:, None, None, None].expand(points.shape[:-1]).flatten()
    inside = contains(prompt, points.flatten(0, -2), times).view(points.shape[:-1]).amax(-1)
    # A step of 0.003 can jump over a corner that a ray only grazes: at most two pixels of 512.
    assert (inside != opacity[..., 0]).sum() <= 2
    assert inside.sum() > 20


def test_the_surface_has_the_prompts_colour_where_it_faces_up():
    view = cameras([0.0], [0.0], elevation=89.0)
    rgb, _ = render([ShapePrompt("purple", "cube", "standing still")], view, GREY)
    assert torch.allclose(rgb[0, 16, 16], torch.tensor(COLOUR_RGB["purple"]), atol=1e-5)


def test_a_mixed_batch_equals_frames_one_by_one():
    prompts = [ShapePrompt("red", shape, motion) for shape in SHAPES for motion in MOTIONS[1:3]]
    views = cameras([36.0 * k for k in range(10)], [0.1 * k for k in range(10)], size=16)
    background = torch.tensor(BACKGROUNDS)[torch.arange(10) % 2]
    rgb, opacity = render(prompts, views, background)
    for k, prompt in enumerate(prompts):
        one_rgb, one_opacity = render([prompt], views[k : k + 1], background[k])
        assert torch.allclose(rgb[k], one_rgb[0], atol=1e-5)
        assert torch.equal(opacity[k], one_opacity[0])


def test_prompts_and_cameras_must_be_as_many():
    with pytest.raises(ValueError, match="1 prompts for 2 cameras"):
        render([ShapePrompt("red", "ball", "sliding")], cameras([0.0, 1.0], [0.0, 0.0]), GREY)
