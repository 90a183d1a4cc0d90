import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats

from fourdfy.evaluation.metrics import (
    MAX_PSNR_DB,
    colour_error,
    gain,
    mean_saturation,
    pearson,
    psnr,
    silhouette_iou,
)

RISING = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0, 7.0])


def square(first: int, last: int) -> torch.Tensor:
    """One 8 x 8 frame, opaque from row and column ``first`` up to ``last``."""
    opacity = torch.zeros(1, 8, 8, 1)
    opacity[:, first:last, first:last] = 1
    return opacity


def test_iou_counts_pixels():
    assert silhouette_iou(square(0, 4), square(2, 6)).item() == pytest.approx(4 / 28)


def test_iou_of_two_empty_frames_is_one_and_of_one_empty_frame_zero():
    empty = torch.zeros(1, 8, 8, 1)
    assert silhouette_iou(empty, empty).item() == 1
    assert silhouette_iou(empty, square(0, 4)).item() == 0


def test_iou_ignores_fog_below_the_threshold():
    assert silhouette_iou(square(0, 4) + 0.4, square(0, 4)).item() == 1


def test_psnr_of_an_offset_of_a_tenth_is_20_db():
    image = torch.full((2, 4, 4, 3), 0.5)
    assert psnr(image + 0.1, image).tolist() == pytest.approx([20, 20], abs=1e-4)


def test_psnr_of_equal_frames_is_finite():
    image = torch.rand(1, 4, 4, 3)
    assert psnr(image, image).item() == pytest.approx(MAX_PSNR_DB)


def test_saturation_is_that_of_hsv_over_the_pixels_inside():
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.4, 0.4], [0.0, 0.0, 0.0], [0.2, 0.5, 0.1]])[None, None]
    inside = torch.tensor([[[True, True, True, False]]])
    assert mean_saturation(colours, inside) == pytest.approx(1 / 3)
    assert mean_saturation(colours, ~inside) == pytest.approx(0.8)
    assert mean_saturation(colours, torch.zeros_like(inside)) == 0


def test_colour_error_is_the_root_mean_square_of_the_channels():
    assert colour_error(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3)) == pytest.approx(math.sqrt(1 / 3))


@given(scale=floats(0.2, 10), shift=floats(-5, 5))
def test_correlation_is_blind_to_scale_and_shift_and_gain_measures_the_scale(scale, shift):
    track = scale * RISING.double() + shift
    assert pearson(track, RISING.double()) == pytest.approx(1)
    assert pearson(-track, RISING.double()) == pytest.approx(-1)
    assert gain(track, RISING.double()) == pytest.approx(scale)


def test_correlation_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 12, generator=generator)
    assert pearson(a, b) == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item(), abs=1e-5)


def test_a_track_that_does_not_move_has_correlation_zero():
    assert pearson(torch.full((6,), 0.3), RISING) == 0
    assert pearson(0.3 + 0.001 * RISING, RISING) == 0  # jitter that happens to rise
    assert gain(torch.full((6,), 0.3), RISING) == 0


def test_unknown_moments_are_left_out():
    track = RISING.clone()
    track[2] = math.nan
    assert pearson(track, RISING) == pearson(RISING, track) == pytest.approx(1)


def test_nothing_is_said_of_a_track_that_is_unknown_at_too_many_moments():
    track = torch.full((8,), math.nan)
    track[:5] = RISING[:5]
    truth = torch.arange(8.0)
    assert pearson(track, truth) is None and gain(track, truth) is None
    track[5] = 7
    assert pearson(track, truth) > 0.9 and gain(track, truth) > 0.9
