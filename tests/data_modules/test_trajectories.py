"""Evaluation sequences against the original's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fourdfy.data.sampling import SingleViewConfig
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
        ("traj_static_test", turntable, None),
        ("traj_static_val", stills, None),
        ("traj_dynamic_val", stills, None),
        ("traj_dynamic_test_none", moving_test, None),
        ("traj_dynamic_test_motion_smooth", moving_test, "motion_smooth"),
        ("traj_dynamic_test_motion_smooth_full", moving_test, "motion_smooth_full"),
    ],
)
def test_sequences_equal_the_reference(group, build, test_traj):
    cameras = build(SingleViewConfig(**CFG, test_traj=test_traj))
    azimuth = torch.from_numpy(REFERENCE[f"{group}/azimuth_deg"])
    torch.testing.assert_close(cameras.azimuth_deg, azimuth, rtol=0, atol=1e-4)
    for index, name in ((0, "c2w_first"), (-1, "c2w_last")):
        expected = torch.from_numpy(REFERENCE[f"{group}/{name}"])
        torch.testing.assert_close(cameras.c2w[index], expected, rtol=1e-5, atol=2e-6)
    if build is not stills:
        times = torch.from_numpy(REFERENCE[f"{group}/frame_times"])
        torch.testing.assert_close(cameras.times, times)


def test_the_validation_still_is_at_rest_and_its_video_is_one_clip():
    cfg = SingleViewConfig(**CFG)
    assert stills(cfg).times.tolist() == [0.0]
    expected = torch.from_numpy(REFERENCE["traj_dynamic_val/frame_times_video"])
    video = front_video(cfg)
    torch.testing.assert_close(video.times, expected)
    assert not video.azimuth_deg.any() and (video.height, video.width) == (256, 256)


@pytest.mark.parametrize("test_traj", [None, "motion_smooth", "motion_smooth_full"])
@pytest.mark.parametrize("frames", [1, 3, 10])
def test_short_clips_have_sequences_too(test_traj, frames):
    cameras = moving_test(
        SingleViewConfig(**{**CFG, "num_frames": frames, "num_frames_factor": 1}, test_traj=test_traj)
    )
    assert len(cameras) >= 4
    assert cameras.times.min() >= 0 and cameras.times.max() <= 1
