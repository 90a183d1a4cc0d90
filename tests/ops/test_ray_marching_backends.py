"""Marching in rounds finds what the reference finds.

Triton runs on a GPU where there is one, else interpreted; numba on the CPU.
"""

import os

import pytest
import torch
from torch.nn.functional import normalize

from fourdfy.ops.ray_marching import OPERATION, find_visible, march, rounds
from fourdfy.ops.ray_marching.rays import Rays, SteppedRays

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
numba = pytest.param("numba", marks=pytest.mark.skipif(DEVICE != "cpu", reason="the cases are on the GPU"))
kernels = pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.triton), numba])
STEP = 0.3 if os.environ.get("TRITON_INTERPRET") == "1" else 0.15  # which takes the interpreter milliseconds


def stepped(origins, directions, *, jitter=0.0, radius=1.0, step_size=STEP, occupied=None):
    origins, directions = torch.as_tensor(origins), torch.as_tensor(directions)
    rays = Rays(origins=origins, directions=directions, times=torch.linspace(0, 1, len(origins))[:, None])
    return SteppedRays(
        rays=rays.to(DEVICE),
        jitter=torch.as_tensor(jitter).expand(len(origins)).to(DEVICE),
        radius=radius,
        step_size=step_size,
        occupied=None if occupied is None else occupied.to(DEVICE),
    )


def random_case(count=32, share=0.5, cells=6, seed=0, **settings):
    """From outside and inside the box, some missing it."""
    generator = torch.Generator().manual_seed(seed)
    origins = 4 * torch.rand(count, 3, generator=generator) - 2
    targets = 3 * torch.rand(count, 3, generator=generator) - 1.5
    return stepped(
        origins,
        normalize(targets - origins, dim=-1),
        jitter=torch.rand(count, generator=generator),
        occupied=torch.rand((cells,) * 3, generator=generator) < share,
        **settings,
    )


def along_the_axes(**settings):
    """Parallel to the faces, through cells, along their borders and in the box's own faces."""
    axes = torch.eye(3).repeat(8, 1)
    aside = torch.tensor([0.0, 0.25, 0.3, -0.5, 1.0, -1.0, 1.001, 0.999]).repeat_interleave(3)[:, None]
    checkers = torch.arange(64).view(4, 4, 4).sum(0).add(torch.arange(4)) % 2 == 0
    settings = {"step_size": 0.125, "occupied": checkers.expand(4, 4, 4).contiguous()} | settings
    return stepped(torch.where(axes == 1, -2.0, aside.expand(-1, 3)), axes, **settings)


CASES = {
    "few cells": lambda: random_case(share=0.1),
    "half of the cells": random_case,
    "the whole box": lambda: random_case(share=1.1),
    "no grid": lambda: along_the_axes(occupied=None),
    "an empty grid": lambda: random_case(share=-1.0),
    "along axes and borders": along_the_axes,
    "half a step further": lambda: along_the_axes(jitter=0.5, radius=0.5),
    "fine cells": lambda: random_case(count=20, cells=100, share=0.01),
    "cells smaller than a step": lambda: random_case(count=20, cells=40, share=0.3),
    "one ray": lambda: random_case(count=1, share=1.1, seed=5),
    "more rays than a program has": lambda: random_case(count=70, step_size=0.3),
    "no rays": lambda: random_case(count=0),
}

cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def waves(scale):
    """Between 0 and about 4 times ``scale``, different at each time."""
    return lambda positions, times: scale * (1 + torch.sin(9 * positions + times).sum(-1)).clamp(min=0)


def in_steps(case, samples):
    """(ray, step) of each sample."""
    k = samples.t_starts / case.step_size - case.jitter[samples.ray_indices]
    assert len(k) == 0 or (k - k.round()).abs().max() < 1e-3
    torch.testing.assert_close(samples.t_ends - samples.t_starts, torch.full_like(k, case.step_size))
    return list(zip(samples.ray_indices.tolist(), k.round().long().tolist(), strict=True))


@kernels
@cases
def test_candidates_are_those_of_the_reference(backend, make):
    case = make()
    ours, theirs = march(case, backend=backend), march(case, backend="torch")
    assert in_steps(case, ours) == in_steps(case, theirs)
    torch.testing.assert_close(ours.t_starts, theirs.t_starts)


@kernels
@cases
def test_visible_samples_are_those_of_the_reference(backend, make):
    assert_same_as_the_reference(make(), 2.0, backend)


@kernels
@pytest.mark.parametrize("scale", [0.0, 0.05, 0.3, 50.0, 1e30])
def test_densities_of_any_size_do(backend, scale):
    assert_same_as_the_reference(random_case(), scale, backend)


def assert_same_as_the_reference(case, scale, backend):
    limits = {"alpha_threshold": torch.tensor(0.013, device=DEVICE), "transmittance_threshold": 1e-3}
    found = [find_visible(case, waves(scale), **limits, backend=name) for name in (backend, "torch")]
    assert in_steps(case, found[0]) == in_steps(case, found[1])


@kernels
@pytest.mark.parametrize("alpha_threshold", [0.0, 1.0])
@pytest.mark.parametrize("transmittance_threshold", [0.0, 0.5])
def test_thresholds_are_those_of_the_reference(backend, alpha_threshold, transmittance_threshold):
    case = random_case()
    density = lambda positions, times: torch.where(positions[:, 0] > 0, 3.0, 1e4)  # noqa: E731
    found = [
        find_visible(
            case,
            density,
            alpha_threshold=alpha_threshold,
            transmittance_threshold=transmittance_threshold,
            backend=name,
        )
        for name in (backend, "torch")
    ]
    assert in_steps(case, found[0]) == in_steps(case, found[1])


@kernels
@pytest.mark.parametrize("worthwhile", [1, 10_000])
@pytest.mark.parametrize("max_samples", [160, 10_000])
def test_rounds_of_any_size_find_the_same(backend, worthwhile, max_samples, monkeypatch):
    case, sizes = random_case(), []
    monkeypatch.setitem(rounds.WORTHWHILE, DEVICE, worthwhile)

    def density(positions, times):
        sizes.append(len(positions))
        return waves(1.0)(positions, times)

    found = find_visible(case, density, alpha_threshold=0.01, max_samples=max_samples, backend=backend)
    assert in_steps(case, found) == in_steps(
        case, find_visible(case, waves(1.0), alpha_threshold=0.01, backend="torch")
    )
    assert max(sizes) <= max(max_samples, rounds.FEWEST[DEVICE])


@kernels
def test_what_lies_behind_opaque_samples_is_not_evaluated(backend):
    case, evaluated = random_case(share=1.1), []

    def density(positions, times):
        evaluated.append(len(positions))
        return torch.full_like(positions[:, 0], 1e4)

    find_visible(case, density, alpha_threshold=0.01, backend=backend)
    candidates = march(case, backend="torch")
    assert evaluated == [int(torch.bincount(candidates.ray_indices).clamp(max=rounds.FEWEST[DEVICE]).sum())]


@kernels
def test_the_density_sees_midpoints_and_their_times(backend, monkeypatch):
    case, seen = random_case(step_size=0.15), []
    monkeypatch.setitem(rounds.FEWEST, DEVICE, 3)
    monkeypatch.setitem(rounds.WORTHWHILE, DEVICE, 100)

    def density(positions, times):
        seen.append((positions, times))
        return torch.zeros_like(positions[:, 0])

    find_visible(case, density, alpha_threshold=0.0, transmittance_threshold=0.0, backend=backend)
    positions, times = (torch.cat(parts) for parts in zip(*seen, strict=True))
    expected = torch.cat(case.rays.midpoints(march(case, backend="torch")), dim=1)
    ours = torch.cat([positions, times], dim=1)
    assert len(seen) > 2 and len(ours) == len(expected)

    def in_order(rows):
        return rows[(rows.double() @ torch.tensor([1.0, 7.0, 50.0, 1e3]).double().to(DEVICE)).argsort()]

    torch.testing.assert_close(in_order(ours), in_order(expected))


@kernels
def test_a_density_that_is_not_a_number_hides_only_what_is_behind_it(backend):
    case = stepped([[-2.0, 0, 0], [-2.0, 0.1, 0]], [[1.0, 0, 0]] * 2, step_size=0.1)
    bad = lambda p, t: torch.where((p[:, 1] == 0) & (p[:, 0] > 0), torch.nan, 1.0)  # noqa: E731
    found = find_visible(case, bad, alpha_threshold=0.0, backend=backend)
    counts = torch.bincount(found.ray_indices).tolist()
    assert counts[0] == pytest.approx(10, abs=1) and counts[1] == pytest.approx(20, abs=1)


@kernels
def test_auto_trusts_the_kernels(backend):
    assert OPERATION.agrees(backend, torch.device(DEVICE), None)


@pytest.mark.skipif(DEVICE != "cpu", reason="the cases are on the GPU")
def test_threads_do_not_change_what_numba_finds():
    case, threads, found = random_case(count=700), torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            found.append(find_visible(case, waves(1.0), alpha_threshold=0.01, backend="numba"))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].tensors().items():
        assert torch.equal(value, getattr(found[1], name))
