"""Ray marching against a slow loop that tries every step of every ray."""

import math

import numpy as np
import pytest
import torch

from fourdfy.ops.ray_marching import find_visible, reference
from fourdfy.ops.ray_marching.rays import Rays, SteppedRays, step_size
from fourdfy.ops.ray_marching.reference import intersect_box, march, visible
from fourdfy.types import Samples

RADIUS = 1.3


def random_rays(count=60, seed=0):
    """From outside and inside the box, some missing it, two along an axis."""
    generator = torch.Generator().manual_seed(seed)
    origins = 4 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 2
    targets = 3 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 1.5
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    directions[0], origins[0] = torch.tensor([1.0, 0, 0]), torch.tensor([-3.0, 0.2, 0.4])
    directions[1], origins[1] = torch.tensor([0, 0, -1.0]), torch.tensor([0.3, -0.1, 3.0])
    return origins, directions, torch.rand(count, generator=generator, dtype=torch.float64)


def cut_into_steps(origins, directions, jitter, **settings):
    times = torch.linspace(0, 1, len(origins), dtype=origins.dtype)[:, None]
    rays = Rays(origins=origins, directions=directions, times=times)
    return SteppedRays(rays=rays, jitter=jitter, **settings)


def random_cells(share, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(5, 5, 5, generator=generator) < share


def slow_march(origins, directions, jitter, radius, dt, occupied):
    """(ray, k) of every kept interval."""
    kept = []
    for ray, (o, d, u) in enumerate(zip(origins.numpy(), directions.numpy(), jitter.numpy(), strict=True)):
        for k in range(math.ceil(10 / dt)):
            midpoint = o + ((u + k) * dt + dt / 2) * d
            if (np.abs(midpoint) > radius).any():
                continue
            cell = np.floor((midpoint + radius) / (2 * radius) * len(occupied)).astype(int)
            if occupied[tuple(cell)]:
                kept.append((ray, k))
    return kept


@pytest.mark.parametrize("share", [0.15, 0.6, 1.0])
@pytest.mark.parametrize("max_candidates", [None, 100])
def test_marching_keeps_exactly_the_intervals_of_a_slow_loop(share, max_candidates):
    origins, directions, jitter = random_rays()
    occupied, dt = random_cells(share), step_size(RADIUS, 40)
    stepped = cut_into_steps(origins, directions, jitter, radius=RADIUS, step_size=dt, occupied=occupied)
    samples = march(stepped, max_candidates=max_candidates)
    k = samples.t_starts / dt - jitter[samples.ray_indices]
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-9)
    found = list(zip(samples.ray_indices.tolist(), k.round().long().tolist(), strict=True))
    assert found == slow_march(origins, directions, jitter, RADIUS, dt, occupied)
    torch.testing.assert_close(samples.t_ends - samples.t_starts, torch.full_like(k, dt))


def test_without_a_grid_the_whole_box_is_kept():
    settings = dict(radius=RADIUS, step_size=step_size(RADIUS, 40))
    without, full = (
        march(cut_into_steps(*random_rays(), **settings, occupied=cells))
        for cells in (None, random_cells(1.1))
    )
    assert torch.equal(without.ray_indices, full.ray_indices)
    assert torch.equal(without.t_starts, full.t_starts)


def test_the_step_cuts_the_diagonal_of_the_box():
    assert step_size(1.0, 512) == pytest.approx(0.006765625)


@pytest.mark.parametrize("occupied", [None, torch.zeros(4, 4, 4, dtype=torch.bool)])
def test_rays_that_meet_nothing_have_no_samples(occupied):
    settings = dict(radius=1.0, step_size=0.1, occupied=occupied)
    away = torch.tensor([[3.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]), torch.zeros(1)
    assert len(march(cut_into_steps(*away, **settings))) == 0
    if occupied is not None:
        towards = torch.tensor([[3.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]), torch.zeros(1)
        assert len(march(cut_into_steps(*towards, **settings))) == 0


def test_box_intersection_inside_outside_and_parallel():
    lower, upper = -torch.ones(3), torch.ones(3)
    origins = torch.tensor([[-3.0, 0, 0], [0.0, 0, 0], [0.0, 2, 0], [0.0, 1, 0]])
    directions = torch.tensor([[1.0, 0, 0]] * 4)
    t_near, t_far = intersect_box(origins, directions, lower, upper)
    assert t_near[:2].tolist() == [2, 0] and t_far[:2].tolist() == [4, 1]
    assert t_far[2] <= t_near[2], "a ray beside the box, parallel to its face, misses it"


def test_visible_drops_thin_and_hidden_samples():
    samples = Samples(
        ray_indices=torch.tensor([0, 0, 0, 0, 1]),
        t_starts=torch.arange(5.0),
        t_ends=torch.arange(5.0) + 1,
    )
    sigmas = torch.tensor([0.001, 1.0, 20.0, 1.0, 1.0])
    assert visible(samples, sigmas, 2, alpha_threshold=0.01).tolist() == [False, True, True, False, True]
    assert visible(samples, sigmas, 2, alpha_threshold=0.0).tolist() == [True, True, True, False, True]
    none_hidden = visible(samples, sigmas, 2, alpha_threshold=0.01, transmittance_threshold=0.0)
    assert none_hidden.tolist() == [False, True, True, True, True]


def test_no_more_candidates_are_evaluated_at_once_than_allowed():
    stepped = cut_into_steps(
        *random_rays(), radius=RADIUS, step_size=step_size(RADIUS, 40), occupied=random_cells(0.6)
    )
    calls = []

    def density(positions, times):
        calls.append(len(positions))
        return 2 * positions[:, 0].abs() + times[:, 0]

    def find(max_samples):
        limits = {"alpha_threshold": 0.1, "max_samples": max_samples, "backend": "torch"}
        return find_visible(stepped, density, **limits)

    whole, parts = find(10_000), find(100)
    assert calls[0] == len(march(stepped)) > 300 and max(calls[1:]) <= 100
    for name, value in whole.tensors().items():
        assert torch.equal(getattr(parts, name), value)
    by_hand = march(stepped)
    sigmas = density(*stepped.rays.midpoints(by_hand))
    seen = reference.visible(by_hand, sigmas, len(stepped), alpha_threshold=0.1)
    assert torch.equal(whole.t_starts, by_hand.t_starts[seen]) and 0 < len(whole) < len(by_hand)
