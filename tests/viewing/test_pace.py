"""The viewer's share of the time, the sizes of its images and the moment it shows, on a clock of ours."""

import math

import pytest

from fourdfy.viewing.pace import LOOP_SECONDS, REST_SECONDS, SAVED_SECONDS, Budget, Playback, Refinement


class Clock:
    """Time goes by when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_a_budget_is_a_share_of_the_time_however_long_each_image_takes():
    clock = Clock()
    budget, spent = Budget(0.1, clock), 0.0
    for number in range(2000):  # steps of 20 ms
        clock.wait(0.02)
        seconds = 0.005 * (1 + number % 7)
        if budget.room >= seconds:
            with budget.spending():
                clock.wait(seconds)
            spent += seconds
    assert 0.09 * (clock.now - 100) < spent < 0.1 * (clock.now - 100) + SAVED_SECONDS
    assert budget.taken == pytest.approx(spent / (clock.now - 100))


def test_what_takes_longer_than_expected_is_paid_back_and_a_long_rest_saves_little():
    clock = Clock()
    budget = Budget(0.1, clock)
    clock.wait(1000)
    assert budget.room == SAVED_SECONDS
    with budget.spending():
        clock.wait(2.5)
    assert budget.room == pytest.approx(-2.0)
    clock.wait(19.9)
    assert budget.room < 0
    clock.wait(0.2)
    assert budget.room > 0


def test_a_pause_counts_neither_as_spent_nor_as_gone_by():
    clock = Clock()
    budget = Budget(0.1, clock)
    with budget.spending():
        clock.wait(0.5)
    with budget.waiting():
        with budget.spending():
            clock.wait(60)
        clock.wait(60)
    assert budget.room == pytest.approx(0) and budget.taken == pytest.approx(1.0)
    clock.wait(0.5)
    assert budget.taken == pytest.approx(0.5)


def sizes(refinement, view, times, *, seconds_per_pixel=1e-7, room=1.0, step=lambda now: 0):
    """What is rendered at these times."""
    shown = []
    for now in times:
        if size := refinement.next_size(view(now), step(now), now, room):
            refinement.shown(step(now), size, seconds_per_pixel * size**2, now)
        shown.append(size)
    return shown


def test_images_are_small_while_the_camera_moves_and_grow_at_rest():
    refinement, cost = Refinement(512), 1e-6  # 512 x 512 pixels take 0.26 s, 128 x 128 take 0.016
    moving = sizes(refinement, lambda now: now, [0.0, 0.1, 0.2], seconds_per_pixel=cost)
    assert moving == [64, 128, 128]
    resting = sizes(refinement, lambda now: 0.2, [0.3, 0.21 + REST_SECONDS, 1.0, 2.0], seconds_per_pixel=cost)
    assert resting == [None, 256, 512, None]
    assert sizes(refinement, lambda now: 0.3, [3.0], seconds_per_pixel=cost) == [128]


def test_a_scene_in_training_is_rendered_again_at_the_size_that_it_has():
    refinement = Refinement(128)
    sizes(refinement, lambda now: "view", [0.0, 1.0, 2.0])
    assert sizes(refinement, lambda now: "view", [3.0, 4.0], step=lambda now: int(now)) == [128, 128]


def test_an_image_waits_until_its_time_is_saved_and_the_smallest_comes_always():
    refinement = Refinement(64)
    assert sizes(refinement, lambda now: now, [0.0, 1.0], seconds_per_pixel=1.0) == [64, 64]
    assert refinement.next_size("new", 0, 2.0, room=0.4) is None
    assert refinement.next_size("new", 0, 2.0, room=SAVED_SECONDS) == 64
    assert refinement.next_size("new", 0, 2.0, room=math.inf) == 64


@pytest.mark.parametrize(("largest", "expected"), [(512, [64, 128, 256, 512]), (100, [100]), (16, [16])])
def test_sizes_end_at_the_largest(largest, expected):
    assert Refinement(largest).sizes == expected


def moments(playback, clock, *after):
    shown = []
    for seconds in after:
        clock.wait(seconds * LOOP_SECONDS)
        shown.append(round(playback.now(), 6))
    return shown


def test_a_clip_plays_in_a_loop_back_and_forth_or_not_at_all():
    clock = Clock()
    playback = Playback(clock)
    assert moments(playback, clock, 0.3) == [0.0]
    playback.seek(1.0)
    assert playback.now() == 1.0
    playback.seek(0.2)
    playback.is_playing = True
    assert moments(playback, clock, 0.3, 0.3, 0.3) == [0.5, 0.8, 0.1]
    playback.ping_pong = True
    assert moments(playback, clock, 0.8, 0.3, 0.3, 0.6) == [0.9, 0.8, 0.5, 0.1]
    playback.speed, playback.ping_pong = 2.0, False
    assert moments(playback, clock, 0.2) == [0.5]
    playback.is_playing = False
    assert moments(playback, clock, 5.0) == [0.5]
