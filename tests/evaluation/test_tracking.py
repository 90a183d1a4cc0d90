"""Following an object through moments by what matches it."""

import pytest
import torch

from fourdfy.evaluation.frames import BACKGROUND, look, orbit
from fourdfy.evaluation.tracking import COORDINATES, angle_track, posed_cameras, poses, track
from fourdfy.shapes import world
from fourdfy.shapes.grammar import ShapePrompt


def equal(moments):
    """Candidates that match equally well."""
    return [[(angle, 0.0) for angle in angles] for angles in moments]


def test_an_angle_track_goes_on_beyond_a_turn():
    truth = 50.0 * torch.arange(12)
    track = angle_track(equal([float(angle) % 360] for angle in truth))
    assert torch.allclose(track, truth, atol=1e-3)


def test_an_angle_track_turns_back_too():
    track = angle_track(equal([(-30.0 * k) % 360] for k in range(12)))
    assert torch.allclose(track, -30.0 * torch.arange(12), atol=1e-3)


@pytest.mark.parametrize("wrong", range(12))
@pytest.mark.parametrize("error", [120.0, 180.0, 240.0])
def test_one_wrong_detection_is_left_out(wrong, error):
    angles = [30.0 * k for k in range(12)]
    angles[wrong] += error
    track = angle_track(equal([angle % 360] for angle in angles))
    known = track.isfinite()
    assert known.tolist() == [k != wrong for k in range(12)]
    steps = track[known] - 30.0 * torch.arange(12)[known]
    assert torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-3)


def test_a_moment_without_a_match_is_unknown_and_does_not_cut_the_track():
    candidates = [[30.0 * k] for k in range(12)]
    candidates[4] = candidates[5] = []
    track = angle_track(equal(candidates))
    assert track.isnan().nonzero()[:, 0].tolist() == [4, 5]
    assert track[11].item() == pytest.approx(330)


def test_a_cube_without_its_mark_is_followed_by_continuity():
    track = angle_track(equal([(30.0 * k + turn) % 360 for turn in (270, 180, 90, 0)] for k in range(12)))
    assert torch.allclose(track - track[0], 30.0 * torch.arange(12), atol=1e-3)


def test_a_still_ghost_that_matches_less_does_not_hold_the_track():
    track = angle_track([[(30.0 * k, 0.0), (0.0, 100.0)] for k in range(12)])
    assert torch.allclose(track, 30.0 * torch.arange(12), atol=1e-3)


def test_no_match_at_any_moment_is_an_unknown_track():
    assert angle_track([[]] * 12).isnan().all()


@pytest.mark.parametrize("motion", ["bouncing", "sliding", "pulsing"])
def test_a_coordinate_is_found_finer_than_it_is_tried(motion):
    """Between two tries, which are 0.05 apart."""

    def render(name):
        prompt = ShapePrompt("red", "ball", name)
        return lambda cameras: world.render([prompt] * len(cameras), cameras, torch.tensor(BACKGROUND))

    azimuths, times = [20.0, 110.0], [0.045, 0.12]
    bank = poses(motion, render("standing still"), orbit([0.0], azimuths, "cpu"))
    found = track(motion, look(render(motion), times, azimuths, "cpu"), bank)
    offset, scale, _ = world.pose(ShapePrompt("red", "ball", motion), torch.tensor(times))
    wanted = {"bouncing": offset[:, 2], "sliding": offset[:, 1], "pulsing": scale}[motion]
    assert (found - wanted).abs().max() < 0.008


@pytest.mark.parametrize(
    ("motion", "time", "value"),
    [("spinning", 0.25, 90.0), ("bouncing", 0.5, 0.4), ("sliding", 0.25, 0.4), ("pulsing", 0.5, 1.45)],
)
def test_moving_the_cameras_shows_the_object_as_if_it_had_moved(motion, time, value):
    def render(prompt):
        return lambda cameras: world.render([prompt] * len(cameras), cameras, torch.tensor(BACKGROUND))

    still, moving = (ShapePrompt("red", "cone", name) for name in ("standing still", motion))
    posed = posed_cameras(orbit([0.0], [20.0, 110.0], "cpu"), COORDINATES[motion], value)
    rgb, _ = render(still)(posed)
    assert (rgb - look(render(moving), [time], [20.0, 110.0], "cpu").rgb).abs().mean() < 1e-3
