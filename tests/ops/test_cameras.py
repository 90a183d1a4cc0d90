"""Cameras against arrays that the original's own data sets computed (float32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fourdfy.ops.cameras import cast_rays, look_at, orbit_cameras, projection_matrix, spherical_positions

REFERENCE = np.load(Path(__file__).parents[1] / "data" / "cameras_reference.npz")
GROUPS = sorted({name.split("/")[0] for name in REFERENCE.files})
FIXED = [group for group in GROUPS if group.startswith("fixed_")]
CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # float32 on both sides, entries of order 1


def entry(group, name):
    return torch.from_numpy(REFERENCE[f"{group}/{name}"])


def fixed_cameras(group):
    height, width = entry(group, "height_width").tolist()
    elevation = entry(group, "elevation_deg")
    return orbit_cameras(
        elevation,
        entry(group, "azimuth_deg"),
        distance=entry(group, "distance"),
        fovy_deg=entry(group, "fovy_deg").item(),
        times=torch.zeros_like(elevation),
        height=height,
        width=width,
    )


@pytest.mark.parametrize("group", FIXED)
def test_poses_equal_the_reference(group):
    cameras = fixed_cameras(group)
    torch.testing.assert_close(cameras.c2w, entry(group, "c2w"), **CLOSE)
    torch.testing.assert_close(cameras.c2w[:, :3, 3], entry(group, "camera_position"), **CLOSE)


@pytest.mark.parametrize("group", FIXED)
def test_rays_equal_the_reference(group):
    rays = cast_rays(fixed_cameras(group))
    torch.testing.assert_close(rays.origins, entry(group, "rays_o"), **CLOSE)
    torch.testing.assert_close(rays.directions, entry(group, "rays_d"), **CLOSE)


@pytest.mark.parametrize("group", FIXED)
def test_projection_times_inverse_pose_equals_the_reference(group):
    cameras = fixed_cameras(group)
    projection = projection_matrix(cameras.fovy_deg, cameras.width / cameras.height)
    mvp = projection @ torch.linalg.inv(cameras.c2w)
    torch.testing.assert_close(mvp, entry(group, "mvp"), rtol=1e-4, atol=1e-5)  # an inverse in float32


@pytest.mark.parametrize("group", [group for group in GROUPS if group.startswith("train_")])
def test_training_batches_of_the_reference_obey_the_conventions(group):
    """Pose, projection and rays of drawn cameras follow from what the batch reports."""
    c2w, positions = entry(group, "c2w"), entry(group, "camera_positions")
    torch.testing.assert_close(c2w[:, :3, 3], positions)
    height, width = entry(group, "hw").tolist()

    if "perturb" not in group and "dynamic" not in group:  # upstream moves the azimuth at a wrong rate
        angles = (entry(group, "elevation"), entry(group, "azimuth"), entry(group, "camera_distances"))
        expected = spherical_positions(*angles)
        torch.testing.assert_close(positions, expected, **CLOSE)
        up = torch.tensor([0.0, 0.0, 1.0]).expand_as(positions)
        torch.testing.assert_close(c2w, look_at(positions, torch.zeros_like(positions), up), **CLOSE)

    mvp = entry(group, "mvp_mtx")
    projection = mvp @ c2w
    fovy = 2 * torch.rad2deg(torch.atan(-1 / projection[:, 1, 1]))
    if f"{group}/fovy" in REFERENCE.files:
        torch.testing.assert_close(fovy, entry(group, "fovy"), rtol=1e-4, atol=1e-4)
    expected = projection_matrix(fovy, width / height) @ torch.linalg.inv(c2w)
    torch.testing.assert_close(mvp, expected, rtol=1e-3, atol=1e-4)

    cameras = orbit_cameras(
        torch.zeros_like(fovy),
        torch.zeros_like(fovy),
        distance=1.0,
        fovy_deg=fovy,
        times=torch.zeros_like(fovy),
        height=height,
        width=width,
    )
    corner = cast_rays(type(cameras)(**{**vars(cameras), "c2w": c2w})).directions[:, 0, 0]
    torch.testing.assert_close(corner, entry(group, "rays_d_corner"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pole", [90.0, -90.0])
def test_the_view_from_a_pole_is_the_limit_of_its_neighbours(pole):
    azimuth = torch.tensor([0.0, 37.0, 90.0, 180.0, -120.0])

    def view(elevation):
        elevations = torch.full_like(azimuth, elevation)
        at = {"distance": 3.0, "fovy_deg": 40.0, "times": torch.zeros(5), "height": 2, "width": 2}
        return orbit_cameras(elevations, azimuth, **at)

    near, at_pole = view(pole * 0.99999), view(pole)
    torch.testing.assert_close(at_pole.c2w, near.c2w, rtol=0, atol=1e-4)
    x, y = at_pole.c2w[:, 0, 3], at_pole.c2w[:, 1, 3]  # as a camera path from a file finds its azimuths
    turned = torch.rad2deg(torch.atan2(y, x)) - azimuth
    torch.testing.assert_close((turned + 180) % 360, torch.full((5,), 180.0), rtol=0, atol=0.1)


def test_three_cameras_take_the_cross_product_along_the_right_axis():
    """The original's ``torch.cross`` without an axis is wrong for exactly 3 cameras."""
    positions = torch.tensor([[3.0, 0, 0], [0, 3.0, 1.0], [-2.0, 1, 0.5], [1.0, -2, 0]])
    up = torch.tensor([0.0, 0.0, 1.0]).expand(4, 3)
    zeros = torch.zeros(4, 3)
    torch.testing.assert_close(look_at(positions[:3], zeros[:3], up[:3]), look_at(positions, zeros, up)[:3])
