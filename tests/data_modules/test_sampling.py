"""Training cameras: distributions, relations within a batch, milestones, times."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdfy.config import parse_config
from fourdfy.data.sampling import frame_times, sample_multi_view, sample_single_view, sample_video
from fourdfy.data.settings import MultiViewConfig, SingleViewConfig, at_step
from fourdfy.ops.cameras import look_at, spherical_positions

REFERENCE = np.load(Path(__file__).parents[1] / "data" / "cameras_reference.npz")
EXACT = dict(camera_perturb=0.0, center_perturb=0.0, up_perturb=0.0)
PAPER = dict(**EXACT, camera_distance_range=(2.5, 3.0), fovy_range=(15.0, 60.0), elevation_range=(0.0, 30.0))
VIDEO = dict(static=False, num_frames=4, sample_rand_frames="t0", height_vid=6, width_vid=10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def single(seed=0, step=0, **cfg):
    return sample_single_view(SingleViewConfig(**{**PAPER, **cfg}), step=step, generator=generator(seed))


def video(seed=0, step=0, **cfg):
    return sample_video(SingleViewConfig(**{**PAPER, **VIDEO, **cfg}), step=step, generator=generator(seed))


def multi(seed=0, step=0, static=True, **cfg):
    clip = {key: cfg.pop(key) for key in ("num_frames", "sample_rand_frames") if key in cfg}
    cfg = {**PAPER, "n_view": 4, "batch_size": 8, "relative_radius": False, **cfg}
    moments = SingleViewConfig(static=static, **clip)
    return sample_multi_view(MultiViewConfig(**cfg), moments, step=step, generator=generator(seed))


def within(values, low, high):
    return bool((values >= low).all() and (values <= high).all())


def unperturbed(cameras):
    return spherical_positions(cameras.elevation_deg, cameras.azimuth_deg, cameras.distances)


# ---------------------------------------------------------------------------------------------
# Distributions


def test_every_draw_stays_in_its_range_and_fills_it():
    cameras = single(batch_size=2000)
    for values, low, high in (
        (cameras.distances, 2.5, 3.0),
        (cameras.fovy_deg, 15, 60),
        (cameras.azimuth_deg, -180, 180),
        (cameras.light_positions.norm(dim=-1), 0.8, 1.5),
    ):
        assert within(values, low - 1e-4, high + 1e-4)
        assert values.max() - values.min() > 0.98 * (high - low)


def test_elevation_is_one_coin_per_batch_and_its_sphere_branch_ends_at_19_degrees():
    largest = torch.stack([single(seed=seed, batch_size=400).elevation_deg.max() for seed in range(60)])
    sphere = math.degrees(math.asin(1 / 3))
    on_sphere = largest <= sphere + 1e-4
    assert 15 < on_sphere.sum() < 45  # 60 fair coins: 30 +- 3.9
    assert within(largest[on_sphere], 18.5, sphere + 1e-4)
    assert within(largest[~on_sphere], 28.5, 30)


def test_azimuths_of_a_batch_are_spread_evenly_unless_told_otherwise():
    azimuth = single(batch_size=9).azimuth_deg
    assert torch.equal(((azimuth + 180) / 40).floor(), torch.arange(9.0))
    free = single(batch_size=9, batch_uniform_azimuth=False).azimuth_deg
    assert not torch.equal(((free + 180) / 40).floor(), torch.arange(9.0))


def test_unperturbed_cameras_look_at_the_origin():
    cameras = single(batch_size=5)
    positions = unperturbed(cameras)
    up = torch.tensor([0.0, 0.0, 1.0]).expand(5, 3)
    torch.testing.assert_close(cameras.c2w, look_at(positions, torch.zeros(5, 3), up))


@pytest.mark.parametrize("pole", [90.0, -90.0])
@pytest.mark.parametrize("draw", [single, video, multi])
def test_training_cameras_at_a_pole_are_the_limit_of_their_neighbours(draw, pole):
    cameras = [draw(seed=1, batch_size=4, elevation_range=(e, e)).c2w for e in (pole, pole * 0.99999)]
    torch.testing.assert_close(*cameras, rtol=0, atol=2e-2)  # "on the sphere" is 0.3 degrees lower


def test_a_moving_camera_stays_at_the_pole_instead_of_turning_over():
    cameras = video(train_dynamic_camera=True, num_frames=16, batch_size=20, elevation_range=(88.0, 90.0))
    assert cameras.elevation_deg.max() == 90
    ups = cameras.c2w[:, :3, 1].view(20, 16, 3)
    assert (ups[:, 1:] * ups[:, :-1]).sum(-1).min() > 0.9


def test_perturbations_have_their_sizes():
    cameras = single(batch_size=4000, camera_perturb=0.1, center_perturb=0.2)
    shift = cameras.c2w[:, :3, 3] - unperturbed(cameras)
    assert within(shift, -0.1 - 1e-5, 0.1 + 1e-5) and shift.max() > 0.099
    # Distance from the origin to the line of sight: two normal components across it, mean 0.2 sqrt(pi / 2).
    cameras = single(batch_size=4000, center_perturb=0.2)
    ahead = -cameras.c2w[:, :3, 2]
    position = cameras.c2w[:, :3, 3]
    miss = torch.linalg.cross(position, ahead, dim=-1).norm(dim=-1)
    assert miss.mean().item() == pytest.approx(0.2 * math.sqrt(math.pi / 2), rel=0.05)
    rolled = single(batch_size=50, up_perturb=0.1).c2w[:, 2, 0]
    assert rolled.abs().max() > 0.05 and single(batch_size=50).c2w[:, 2, 0].abs().max() < 1e-5


def test_lights_surround_the_camera_or_lie_within_60_degrees_of_it():
    def angles(**cfg):
        cameras = single(batch_size=2000, **cfg)
        cosine = torch.nn.functional.cosine_similarity(cameras.light_positions, cameras.c2w[:, :3, 3])
        return torch.rad2deg(cosine.clamp(-1, 1).acos())

    assert angles(light_position_perturb=0.0).max() < 0.1
    assert angles().max() > 45
    assert within(angles(light_sample_strategy="magic3d"), 0, 60.01)


# ---------------------------------------------------------------------------------------------
# Groups of views


def test_views_of_a_group_differ_only_in_azimuth_and_stand_90_degrees_apart():
    cameras = multi(camera_perturb=0.1, center_perturb=0.1, up_perturb=0.1)
    for values in (cameras.elevation_deg, cameras.distances, cameras.fovy_deg, cameras.times):
        groups = values.view(2, 4)
        assert torch.equal(groups, groups[:, :1].expand(2, 4))
    torch.testing.assert_close(cameras.azimuth_deg.view(2, 4).diff(), torch.full((2, 3), 90.0))
    shift = (cameras.c2w[:, :3, 3] - unperturbed(cameras)).view(2, 4, 3)
    torch.testing.assert_close(shift, shift[:, :1].expand(2, 4, 3), rtol=0, atol=1e-5)
    assert (shift[0] - shift[1]).abs().max() > 1e-3, "groups have their own draws"


def test_reference_batches_have_the_same_relations():
    for group in ("train_multiview_stage1_0", "train_multiview_relative_radius_zoom_perturb_0"):
        azimuth = REFERENCE[f"{group}/azimuth"].reshape(2, 4)
        np.testing.assert_allclose(np.diff(azimuth), 90, atol=1e-3)
        lights = np.linalg.norm(REFERENCE[f"{group}/light_positions"], axis=-1).reshape(2, 4)
        np.testing.assert_allclose(lights, lights[:, :1].repeat(4, 1), rtol=1e-5)
    azimuth = REFERENCE["train_single_video_dynamic_camera_0/azimuth"]
    np.testing.assert_allclose(np.diff(azimuth, 2), 0, atol=1e-3)


def test_relative_radius_keeps_the_image_size_and_zoom_changes_it():
    plain = multi(seed=3)
    relative = multi(seed=3, relative_radius=True)
    scale = torch.tan(0.5 * torch.deg2rad(plain.fovy_deg))
    torch.testing.assert_close(relative.distances * scale, plain.distances)
    zoomed = multi(seed=3, relative_radius=True, zoom_range=(0.5, 0.5))
    torch.testing.assert_close(zoomed.fovy_deg, 0.5 * plain.fovy_deg)
    torch.testing.assert_close(zoomed.distances, relative.distances)


def test_a_batch_that_fills_no_group_is_refused_with_the_nearest_that_does():
    with pytest.raises(ValueError, match=r"use a multiple, e\.g\. data\.multi_view\.batch_size=4"):
        MultiViewConfig(n_view=4, batch_size=6)
    with pytest.raises(ValueError, match=r"batch_size=2 "):
        MultiViewConfig(n_view=4, batch_size=[8, 2], resolution_milestones=(10,))


# ---------------------------------------------------------------------------------------------
# Videos and times


def test_a_video_is_one_camera_at_successive_times():
    cameras = video(batch_size=2, camera_perturb=0.1)
    assert (len(cameras), cameras.height, cameras.width) == (8, 6, 10)
    poses = cameras.c2w.view(2, 4, 4, 4)
    assert torch.equal(poses, poses[:, :1].expand(2, 4, 4, 4)) and not torch.equal(poses[0], poses[1])
    times = cameras.times.view(2, 4)
    torch.testing.assert_close(times.diff(), torch.full((2, 3), 0.25))
    assert within(times[:, 0], 0, 0.25) and times.max() < 1


def test_times_without_t0_cover_the_clip_with_both_ends():
    torch.testing.assert_close(video(sample_rand_frames=None).times, torch.tensor([0, 1 / 3, 2 / 3, 1]))


def test_a_looped_clip_starts_at_any_time_and_goes_on_behind_the_end():
    times = torch.cat([video(seed=s, batch_size=2, sample_rand_frames="loop").times for s in range(40)])
    times = times.view(-1, 4)
    torch.testing.assert_close(times.diff() % 1, torch.full((80, 3), 0.25))
    assert within(times, 0, 1) and times.max() < 1
    for frame in times.T:  # at every place of the clip every time is as likely
        assert torch.histc(frame, 4, 0, 1).min() > 8  # 20 expected
    assert (times[::2, 0] != times[1::2, 0]).all(), "each clip has a draw of its own"


@pytest.mark.parametrize("mode", ["t0", "loop", None])
def test_a_share_of_the_clips_runs_backwards_if_asked_for(mode):
    forwards, backwards = (
        torch.stack([video(s, sample_rand_frames=mode, prob_reversed=p).times for s in range(60)])
        for p in (0.0, 1.0)
    )
    assert torch.equal(backwards, forwards.flip(1))
    some = torch.stack([video(s, sample_rand_frames=mode, prob_reversed=0.5).times for s in range(60)])
    turned = (some == backwards).all(1)
    assert ((some == forwards).all(1) | turned).all() and 15 < turned.sum() < 45
    plain, turned = (video(prob_reversed=p, train_dynamic_camera=True) for p in (0.0, 1.0))
    torch.testing.assert_close(turned.distances, plain.distances)  # only time runs backwards


def test_reference_times_are_t0_times():
    for seed in (0, 1):
        times = torch.from_numpy(REFERENCE[f"train_single_video_stage3_{seed}/frame_times"])
        torch.testing.assert_close(times.diff(), torch.full((15,), 1 / 16))
        assert 0 <= times[0] < 1 / 16
    assert frame_times(1, 16, "t0", generator())[0].diff().allclose(times.diff())


@pytest.mark.parametrize("draw", [single, multi])
def test_a_still_of_a_dynamic_scene_has_one_of_the_times_for_all_its_cameras(draw):
    dynamic = {"num_frames": 4, "sample_rand_frames": None, "static": False}
    times = torch.stack([draw(seed=seed, batch_size=4, **dynamic).times for seed in range(80)])
    assert torch.equal(times, times[:, :1].expand_as(times))
    found, counts = times[:, 0].unique(return_counts=True)
    torch.testing.assert_close(found, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert counts.min() > 8  # 20 expected


def test_static_scenes_have_time_0_and_no_videos():
    assert not single(num_frames=4).times.any() and not multi(num_frames=4).times.any()
    with pytest.raises(ValueError, match="static=true has no video steps"):
        video(static=True)


def test_a_moving_camera_drifts_at_constant_rates_and_turns_at_the_azimuth_rate():
    cameras = video(train_dynamic_camera=True, num_frames=8, batch_size=40)
    for values, limit in (
        (cameras.elevation_deg, 180 / (16 * 8)),
        (cameras.azimuth_deg, 180 / (2 * 8)),
        (cameras.distances, 0.5 / 8),
    ):
        rates = values.view(40, 8).diff()
        torch.testing.assert_close(rates, rates[:, :1].expand(40, 7), rtol=0, atol=1e-4)
        assert 0.7 * limit < rates.abs().max() < limit
    assert within(cameras.distances, 2.5, 3.0)
    # Quirk 4 of the original: its poses turn at the elevation's rate.
    torch.testing.assert_close(cameras.c2w[:, :3, 3], unperturbed(cameras))


# ---------------------------------------------------------------------------------------------
# Milestones


def test_milestones_take_effect_at_their_step():
    for step, height, width, batch in REFERENCE["milestones_stage1_multiview/step_height_width_batch"]:
        sizes = [at_step(values, (5000,), int(step)) for values in ([64, 256], [64, 256], [8, 4])]
        assert sizes == [height, width, batch]


def test_samplers_follow_the_milestones():
    cfg = dict(batch_size=[8, 4], height=[4, 6], width=[5, 7], resolution_milestones=(10,))
    for draw in (single, multi):
        before, after = draw(step=9, **cfg), draw(step=10, **cfg)
        assert (len(before), before.height, before.width) == (8, 4, 5)
        assert (len(after), after.height, after.width) == (4, 6, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": [64, 128]}, "2 entries for 0 resolution_milestones"),
        ({"width": "64"}, "expected an integer"),
        ({"batch_size": 0}, r"batch_size: 0 is outside the range; expected 1 to 1024"),
        ({"fovy_range": [0, 0]}, r"fovy_range: 0 is outside"),
        ({"eval_height": 0}, "eval_height: 0 is outside"),
        ({"n_test_views": 0}, "n_test_views: 0 is outside"),
        ({"resolution_milestones": [20, 10]}, "earlier steps come first"),
        ({"light_distance_range": [2, 1]}, "the lower bound comes first"),
        ({"fovy_range": [60, 15]}, "the lower bound comes first"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        parse_config(SingleViewConfig, given, "data.single_view")
