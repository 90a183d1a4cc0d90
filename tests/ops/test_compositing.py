"""Compositing against a slow loop over rays, and the invariances of the volume rendering integral."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, lists

from fourdfy.ops.compositing import composite, expected_depth
from fourdfy.ops.compositing.reference import (
    accumulate,
    running_sum,
    transmittance_from_density,
    weights_from_density,
)
from fourdfy.types import Samples

RAY_INDICES = torch.tensor([0, 0, 0, 2, 2, 3, 5, 5, 5, 5])
N_RAYS = 7  # rays 1 and 4 in the middle and 6 at the end have no samples


def packed(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(RAY_INDICES)
    sigmas = 3 * torch.rand(count, generator=generator, dtype=dtype)
    t_starts = torch.arange(count, dtype=dtype)
    t_ends = t_starts + 0.2 + 0.5 * torch.rand(count, generator=generator, dtype=dtype)
    values = torch.rand(count, 3, generator=generator, dtype=dtype)
    return sigmas, t_starts, t_ends, values


def slow_render(sigmas, t_starts, t_ends, values):
    """Ray by ray, sample by sample: (weights, pixels, opacity, depth, z variance)."""
    weights = torch.zeros_like(sigmas)
    pixels, opacity, depth, variance = (torch.zeros(N_RAYS, c, dtype=sigmas.dtype) for c in (3, 1, 1, 1))
    for ray in range(N_RAYS):
        light = 1.0
        own = [i for i in range(len(sigmas)) if RAY_INDICES[i] == ray]
        for i in own:
            alpha = 1 - torch.exp(-sigmas[i] * (t_ends[i] - t_starts[i]))
            weights[i] = alpha * light
            light = light * (1 - alpha)
        for i in own:
            t_mid = (t_starts[i] + t_ends[i]) / 2
            pixels[ray] += weights[i] * values[i]
            opacity[ray] += weights[i]
            depth[ray] += weights[i] * t_mid
        for i in own:
            variance[ray] += weights[i] * ((t_starts[i] + t_ends[i]) / 2 - depth[ray]) ** 2
    return weights, pixels, opacity, depth, variance


def fast_render(sigmas, t_starts, t_ends, values):
    samples = Samples(ray_indices=RAY_INDICES, t_starts=t_starts, t_ends=t_ends)
    out = composite(sigmas, values, samples, N_RAYS)
    return out.weights, out.values, out.opacity, out.depth, out.z_variance


@pytest.mark.parametrize("quantity", range(5), ids=["weights", "pixels", "opacity", "depth", "z_variance"])
def test_packed_compositing_equals_a_loop_over_rays(quantity):
    torch.testing.assert_close(fast_render(*packed())[quantity], slow_render(*packed())[quantity])


def test_gradients_are_right():
    inputs = [tensor.requires_grad_() for tensor in packed()]
    assert torch.autograd.gradcheck(fast_render, inputs)


def test_weights_and_what_gets_through_sum_to_one():
    sigmas, t_starts, t_ends, _ = packed()
    weights = weights_from_density(sigmas, t_starts, t_ends, RAY_INDICES, N_RAYS)
    opacity = accumulate(weights, torch.ones(len(weights), 1, dtype=weights.dtype), RAY_INDICES, N_RAYS)
    depths = torch.zeros(N_RAYS, dtype=sigmas.dtype).index_add(0, RAY_INDICES, sigmas * (t_ends - t_starts))
    torch.testing.assert_close(opacity[:, 0], 1 - torch.exp(-depths))


@given(
    sigmas=lists(floats(0, 1e4), min_size=1, max_size=8),
    cut=floats(0.1, 0.9),
)
def test_cutting_every_interval_in_two_changes_no_weight(sigmas, cut):
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    edges = torch.linspace(1, 2, len(sigmas) + 1, dtype=torch.float64)
    ray = partial(torch.zeros, dtype=torch.long)
    whole = weights_from_density(sigmas, edges[:-1], edges[1:], ray(len(sigmas)), 1)

    cuts = edges[:-1] + cut * (edges[1:] - edges[:-1])
    t_starts = torch.stack([edges[:-1], cuts], dim=1).flatten()
    t_ends = torch.stack([cuts, edges[1:]], dim=1).flatten()
    halves = weights_from_density(sigmas.repeat_interleave(2), t_starts, t_ends, ray(2 * len(sigmas)), 1)
    torch.testing.assert_close(halves.view(-1, 2).sum(1), whole, rtol=1e-9, atol=1e-12)


def test_a_ray_does_not_depend_on_dense_rays_before_it():
    # 20,000 opaque rays first: a float32 running sum would be near 2e8, with steps of 16.
    before, thin = 20_000, torch.tensor([0.1, 0.2, 0.3])
    sigmas = torch.cat([torch.full((before,), 1e4), thin])
    ray_indices = torch.cat([torch.arange(before), torch.full((3,), before)])
    steps = torch.ones(before + 3)
    behind = transmittance_from_density(sigmas, torch.zeros_like(steps), steps, ray_indices, before + 1)[-3:]
    torch.testing.assert_close(behind, torch.exp(-torch.tensor([0.0, 0.1, 0.3])))


def test_no_samples_give_zero_images_with_a_graph():
    sigmas = torch.zeros(0, requires_grad=True)
    nothing, nowhere = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    samples = Samples(ray_indices=nowhere, t_starts=nothing, t_ends=nothing)
    out = composite(sigmas, torch.zeros(0, 3), samples, 4)
    assert out.values.shape == (4, 3)
    assert not any(sums.any() for sums in out.tensors().values())
    out.opacity.sum().backward()
    assert sigmas.grad.shape == (0,)


@pytest.mark.parametrize("n_samples", [1, 2, 37])
def test_the_sum_in_a_fixed_order_is_the_sum(n_samples):
    values = torch.linspace(0.1, 3, n_samples, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 1, n_samples, dtype=torch.float64)
    expected = values.cumsum(0)
    torch.use_deterministic_algorithms(True)
    try:
        total = running_sum(values)
        assert "Cumsum" not in type(total.grad_fn).__name__
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(total, expected)
    gradients = [torch.autograd.grad((weights * sums).sum(), values)[0] for sums in (total, expected)]
    torch.testing.assert_close(*gradients)


def test_expected_depth_is_the_mean_of_the_distances_where_more_than_half_the_light_is_stopped():
    weights = torch.tensor([[0.3, 0.3], [0.25, 0.25], [0.0, 0.0], [0.0, 1.0]])
    distances = torch.tensor([2.0, 4.0])
    opacity, depth = weights.sum(1), weights @ distances
    shown = expected_depth(opacity.view(1, 2, 2, 1), depth.view(1, 2, 2, 1)).flatten()
    torch.testing.assert_close(shown, torch.tensor([3.0, 0.0, 0.0, 4.0]))
