"""The occupancy grid keeps what moves, and drops what is empty."""

import pytest
import torch
from analytic_scene import make_scene

from fourdfy.types import StepContext


def lost_and_occupied(parts, moments=32, points=20_000):
    """Share of points with alpha above 0.01 in empty cells, over all moments; share of occupied cells."""
    renderer, geometry = parts.renderer, parts.scene.geometry
    generator = torch.Generator().manual_seed(7)
    occupied = renderer.estimator.occupied
    lost = seen = 0
    for moment in torch.linspace(0, 1, moments):
        positions = 2 * torch.rand(points, 3, generator=generator) - 1
        sigmas = geometry.density(positions, moment.expand(points, 1), step=0)
        dense = positions[sigmas * renderer.step_size > 0.01]
        cell = ((dense + 1) / 2 * len(occupied)).long()
        lost += (~occupied[cell.unbind(1)]).sum()
        seen += len(dense)
    return float(lost / seen), float(occupied.float().mean())


@pytest.mark.parametrize("last_step", [160, 512])
def test_no_sample_of_a_moving_object_is_lost_at_any_time(last_step):
    parts = make_scene(grid_resolution=32, size=0.2, sharpness=60, refresh=False, num_samples_per_ray=128)
    generator = torch.Generator().manual_seed(0)
    for step in range(0, last_step, 16):
        parts.renderer.update_occupancy(StepContext(step, generator), dynamic=True)
    lost, occupied = lost_and_occupied(parts)
    assert lost == 0
    assert occupied < 0.3


def test_without_dilation_the_rim_of_what_moves_is_lost():
    lost, _ = lost_and_occupied(make_scene(grid_resolution=32, size=0.2, occ_dilation=0))
    assert lost > 0.005, "else dilation would not be worth its samples"


def test_a_static_refresh_sees_only_time_0():
    parts = make_scene(grid_resolution=16, dynamic=False)
    occupied = parts.renderer.estimator.occupied
    assert occupied[11, 7, 7] and not occupied[4, 7, 7]  # the ball is at x = 0.5 at time 0, at -0.5 later


def test_an_object_that_leaves_is_forgotten():
    parts = make_scene(orbit=0.0, dynamic=False)
    before = parts.renderer.estimator.occupied.sum()
    with torch.no_grad():
        parts.scene.geometry.size = 0.15
    generator = torch.Generator().manual_seed(1)
    for step in range(160, 160 + 16 * 150, 16):
        parts.renderer.update_occupancy(StepContext(step, generator), dynamic=False)
    assert parts.renderer.estimator.occupied.sum() < 0.5 * before


def test_refreshes_come_every_update_interval():
    parts = make_scene(refresh=False, update_interval=5)
    generator = torch.Generator().manual_seed(0)
    for step in (1, 4, 6):
        parts.renderer.update_occupancy(StepContext(step, generator), dynamic=False)
        assert not parts.renderer.estimator.occs.any()
    parts.renderer.update_occupancy(StepContext(5, generator), dynamic=False)
    assert parts.renderer.estimator.occs.any()


def test_refreshes_repeat_with_the_generator():
    first, second = make_scene().renderer.estimator, make_scene().renderer.estimator
    assert torch.equal(first.occs, second.occs)
