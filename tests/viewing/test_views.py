"""What a free camera sees of a scene, as each of the views."""

import math

import numpy as np
import pytest
import torch

from fourdfy.evaluation.scenes import ground_truth
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.shapes.grammar import parse_prompt
from fourdfy.types import RenderOutput
from fourdfy.viewing.views import VIEWS, Eye, picture
from tests.viewing.scenes import ball


def eye(azimuth_deg=0.0, elevation_deg=0.0, aspect=1.0):
    angles = torch.tensor([elevation_deg]), torch.tensor([azimuth_deg])
    size = {"height": 8, "width": 8}
    camera = orbit_cameras(*angles, distance=3.0, fovy_deg=40.0, times=torch.zeros(1), **size)
    return Eye(tuple(map(tuple, camera.c2w[0].tolist())), 40.0, aspect)


def test_a_camera_of_the_page_is_that_of_a_training():
    cameras = eye(azimuth_deg=30.0, elevation_deg=20.0, aspect=2.0).cameras(0.25, 64)
    expected = orbit_cameras(
        torch.tensor([20.0]), torch.tensor([30.0]), distance=3.0, fovy_deg=40.0,
        times=torch.tensor([0.25]), height=32, width=64,
    )  # fmt: skip
    assert (cameras.height, cameras.width) == (32, 64)
    for name, value in expected.tensors().items():
        assert torch.allclose(getattr(cameras, name), value, atol=1e-4), name


@pytest.mark.parametrize(("aspect", "size"), [(2.0, (32, 64)), (0.5, (64, 32)), (1.0, (64, 64))])
def test_the_longer_side_is_as_long_as_asked_for(aspect, size):
    assert picture("rgb", ball, eye(aspect=aspect), 0.0, 64).shape == (*size, 3)


def test_time_and_each_view_are_those_that_are_asked_for():
    seen = {view: picture(view, ball, eye(), 1.0, 64) for view in VIEWS}
    middle = {view: image[32, 32].tolist() for view, image in seen.items()}
    assert middle["rgb"] == [0, 255, 0] and picture("rgb", ball, eye(), 0.0, 64)[32, 32].tolist() == [
        255,
        0,
        0,
    ]
    assert middle["opacity"] == [255, 255, 255] and seen["opacity"][0, 0].tolist() == [0, 0, 0]
    assert middle["depth"][0] > middle["depth"][2]  # the nearest is red
    assert np.allclose(middle["normals"], [254, 127, 127], atol=4)  # towards the camera, at +x
    assert middle["motion"] == [255, 255, 0]  # from red to green


def test_normals_of_a_depth_point_away_from_the_surface():
    image = picture("normals", ball, eye(azimuth_deg=90.0), 0.0, 65)
    assert np.allclose(image[32, 32], [127, 254, 127], atol=4)
    above, right = image[20, 32], image[32, 44]
    assert above[2] > 160 and right[0] < 100  # up is +z; from +y, right is -x


def test_a_scenes_own_normals_and_displacement_are_shown_instead():
    def with_extras(cameras):
        frames = ball(cameras)
        moved = torch.zeros_like(frames.comp_rgb)
        moved[..., 40:, 0], moved[..., :10, 2] = 0.2, -0.1
        own = torch.full_like(frames.comp_rgb, 0.5)
        return RenderOutput(**{**vars(frames), "comp_normal": own, "deformation": moved})

    assert (picture("normals", with_extras, eye(), 0.0, 64) == 127).all()
    image = picture("motion", with_extras, eye(), 0.0, 64)
    assert image[5, 50].tolist() == [255, 127, 127] and image[5, 5].tolist() == [127, 127, 63]


def test_the_truth_stands_beside_the_scene_seen_by_the_same_camera():
    truth = ground_truth(parse_prompt("a red cube bouncing"))

    def same(cameras):
        rgb, opacity = truth(cameras)
        return RenderOutput(comp_rgb=rgb, opacity=opacity, depth=opacity)

    image = picture("rgb", same, eye(azimuth_deg=20.0, aspect=2.0), 0.3, 64, truth)
    assert image.shape == (32, 64, 3) and np.array_equal(image[:, :32], image[:, 32:])
    assert not math.isclose(image.std(), 0)
