import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers

from fourdfy.evaluation.marks import (
    body_colour,
    foreground_colour,
    front_scores,
    fronts,
    painted,
    visible_mark,
    wrap,
)

VIEWS = 24


def bump(*centres_deg: float, height: float = 1.0, width_deg: float = 35.0) -> torch.Tensor:
    """Scores of views around an object with fronts at ``centres_deg``: triangles, as the truth has."""
    azimuths = torch.arange(VIEWS) * 360.0 / VIEWS
    scores = torch.zeros(VIEWS)
    for centre in centres_deg:
        away = (azimuths - centre + 180).remainder(360) - 180
        scores = torch.maximum(scores, height * (1 - away.abs() / width_deg).clamp_min(0))
    return scores


@given(centre=floats(0, 359.9))
def test_one_front_is_found_where_it_is(centre):
    (found,) = fronts(bump(centre))
    assert abs(wrap(found - centre)) < 4  # a quarter of the views' spacing


@given(centre=floats(0, 359.9), count=integers(2, 4))
def test_every_face_of_a_janus_is_counted(centre, count):
    faces = [centre + 360 * k / count for k in range(count)]
    assert len(fronts(bump(*faces))) == count


def test_faces_with_a_valley_between_them_that_does_not_reach_zero_are_counted():
    assert len(fronts(bump(0, 90, 180, 270, width_deg=70).clamp_min(0.3))) == 4


def test_a_notch_in_one_front_does_not_split_it():
    scores = bump(180, width_deg=60)
    scores[VIEWS // 2] *= 0.7
    assert len(fronts(scores)) == 1
    scores[VIEWS // 2 - 3 : VIEWS // 2 + 3] = torch.tensor(
        [0.4, 0.35, 0.35, 0.8, 1.0, 0.6]
    )  # nor does a shoulder
    assert len(fronts(scores)) == 1


def test_white_without_a_pupil_is_no_front():
    visible = torch.tensor([[0.1, 0.04], [0.1, 0.0], [0.05, 0.04]])
    assert torch.allclose(front_scores(visible, visible[0]), torch.tensor([1.0, 0.0, 0.5]))


def test_a_weak_mark_is_no_front():
    assert fronts(bump(90, height=0.2)) == []
    assert fronts(torch.zeros(VIEWS)) == []


def test_a_mark_seen_from_everywhere_is_no_front():
    assert fronts(torch.full((VIEWS,), 0.9)) == []


@given(angle=floats(-1000, 1000))
def test_wrap_changes_an_angle_by_whole_turns(angle):
    assert -180 <= wrap(angle) < 180
    turns = (wrap(angle) - angle) / 360
    assert turns == pytest.approx(round(turns), abs=1e-9)


def test_the_background_is_taken_out_of_translucent_pixels():
    foreground, background = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.8, 0.8, 0.8])
    opacity = torch.full((1, 2, 2, 1), 0.6)
    rgb = 0.6 * foreground + 0.4 * background.expand(1, 2, 2, 3)
    assert torch.allclose(foreground_colour(rgb, opacity, background), foreground, atol=1e-6)


def test_the_body_colour_is_not_the_marks():
    colours = torch.tensor([0.9, 0.1, 0.1]).repeat(1, 6, 6, 1)
    colours[:, :4] = 0.98
    assert torch.allclose(
        body_colour(colours, torch.ones(1, 6, 6, dtype=torch.bool)), torch.tensor([0.9, 0.1, 0.1])
    )


def test_an_empty_silhouette_has_a_colour_and_no_mark():
    colours, inside = torch.rand(1, 6, 6, 3), torch.zeros(1, 6, 6, dtype=torch.bool)
    assert body_colour(colours, inside).tolist() == [0, 0, 0]
    visible = visible_mark(painted(colours, inside, torch.tensor([0.9, 0.1, 0.1])), inside)
    assert visible.tolist() == [[0, 0]] and math.isfinite(visible.sum())
