"""Evaluation sequences against the original's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fourdfy.data.settings import SingleViewConfig
from fourdfy.data.trajectories import front_video, moving_test, stills, turntable

REFERENCE = np.load(Path(__file__).parents[1] / "data" / "cameras_reference.npz")
CFG = dict(
    static=False,
    num_frames=16,
    num_frames_factor=4,
    eval_camera_distance=3.0,
    eval_fovy_deg=40.0,
    eval_height=256,
    eval_width=256,
)


@pytest.mark.parametrize(
    ("group", "build", "test_traj"),
    [
        ("traj_static_val", stills, None),
        ("traj_dynamic_val", stills, None),
        ("traj_dynamic_test_none", moving_test, None),
        ("traj_dynamic_test_motion_smooth", moving_test, "motion_smooth"),
        ("traj_dynamic_test_motion_smooth_full", moving_test, "motion_smooth_full"),
    ],
)
def test_views_equal_the_reference(group, build, test_traj):
    """The moments don't: the original's skip two of its clip's, or show both of its ends."""
    cameras = build(SingleViewConfig(**CFG, test_traj=test_traj))
    azimuth = torch.from_numpy(REFERENCE[f"{group}/azimuth_deg"])
    torch.testing.assert_close(cameras.azimuth_deg, azimuth, rtol=0, atol=1e-4)
    for index, name in ((0, "c2w_first"), (-1, "c2w_last")):
        expected = torch.from_numpy(REFERENCE[f"{group}/{name}"])
        torch.testing.assert_close(cameras.c2w[index], expected, rtol=1e-5, atol=2e-6)


def test_the_validation_still_is_at_rest_and_its_video_is_one_clip():
    cfg = SingleViewConfig(**CFG)
    assert stills(cfg).times.tolist() == [0.0]
    video = front_video(cfg)
    torch.testing.assert_close(video.times, torch.arange(64) / 64)
    assert not video.azimuth_deg.any() and (video.height, video.width) == (256, 256)


@pytest.mark.parametrize("test_traj", [None, "motion_smooth", "motion_smooth_full"])
@pytest.mark.parametrize("frames", [1, 3, 10])
def test_short_clips_have_sequences_too(test_traj, frames):
    cameras = moving_test(
        SingleViewConfig(**{**CFG, "num_frames": frames, "num_frames_factor": 1}, test_traj=test_traj)
    )
    assert len(cameras) >= 4
    assert cameras.times.min() >= 0 and cameras.times.max() < 1


def steps(values, period):
    """From each frame to the next, and from the last to the first, in (-period / 2, period / 2]."""
    around = (values.double().roll(-1) - values.double()) % period
    return torch.where(around > period / 2, around - period, around)


@pytest.mark.parametrize(
    ("build", "test_traj", "clips"),
    [
        (front_video, None, 1),
        (moving_test, None, 8),
        (moving_test, "motion_smooth", 2),
        (moving_test, "motion_smooth_full", 2),
    ],
)
@pytest.mark.parametrize("parts", [3, 4])
def test_a_sequence_in_a_loop_shows_whole_clips_at_one_speed(build, test_traj, clips, parts):
    cfg = SingleViewConfig(**CFG, test_traj=test_traj, num_test_loop_static=parts)
    times = build(cfg).times
    clips = 2 * parts if clips == 8 else clips
    pace = torch.full_like(times, clips / len(times)).double()
    torch.testing.assert_close(steps(times, 1), pace, rtol=0, atol=1e-6)


@pytest.mark.parametrize("test_traj", [None, "motion_smooth", "motion_smooth_full"])
def test_a_camera_in_a_loop_turns_from_the_last_view_to_the_first_as_from_part_to_part(test_traj):
    azimuth = moving_test(SingleViewConfig(**CFG, test_traj=test_traj)).azimuth_deg
    turns = steps(azimuth, 360).view(4, -1)
    torch.testing.assert_close(turns, turns[:1].expand_as(turns), rtol=0, atol=1e-4)
    assert turns.abs().max() < 360 / 4 / 14


def test_a_turntable_in_a_loop_shows_no_view_twice():
    turns = steps(turntable(SingleViewConfig(n_test_views=24)).azimuth_deg, 360)
    torch.testing.assert_close(turns, torch.full((24,), 15.0).double())
