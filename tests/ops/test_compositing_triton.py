"""Compositing in Triton agrees with the torch reference: on a GPU where there is one, else interpreted."""

import pytest
import torch

from fourdfy.ops.compositing import OPERATION, composite
from fourdfy.types import Samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUTS = ("weights", "opacity", "depth", "z_variance", "values")
kernels = pytest.mark.triton


def case(counts, density=30.0, channels=3, seed=0):
    """Densities, values and samples of rays that have so many each, in steps of 0.01."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(counts, dtype=torch.long)
    ray_indices = torch.arange(len(counts)).repeat_interleave(counts)
    within = torch.arange(len(ray_indices)) - (counts.cumsum(0) - counts)[ray_indices]
    t_starts = 2 + 0.01 * within + 0.3 * torch.rand(len(counts), generator=generator)[ray_indices]
    sigmas = density * torch.rand(len(ray_indices), generator=generator)
    values = torch.randn(len(ray_indices), channels, generator=generator)
    samples = Samples(ray_indices=ray_indices, t_starts=t_starts, t_ends=t_starts + 0.01)
    return sigmas, values, samples, len(counts)


def in_dtype(samples, dtype):
    return samples.mapped(lambda value: value.to(DEVICE, dtype if value.is_floating_point() else None))


def values_and_gradients(sigmas, values, samples, n_rays, backend, dtype, outputs):
    """The reference computes in float64 what the kernels compute in float32."""
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (sigmas, values)]
    out = composite(*inputs, in_dtype(samples, dtype), n_rays, backend)
    generator = torch.Generator().manual_seed(7)
    results = [getattr(out, name) for name in OUTPUTS]
    upstream = [torch.randn(r.shape, generator=generator).to(DEVICE, dtype) for r in results]
    chosen = [(r, g) for name, r, g in zip(OUTPUTS, results, upstream, strict=True) if name in outputs]
    gradients = torch.autograd.grad(
        [r for r, _ in chosen], inputs, [g for _, g in chosen], materialize_grads=True, allow_unused=True
    )
    return [*results, *gradients]


def assert_agrees(given, outputs=OUTPUTS):
    ours = values_and_gradients(*given, "triton", torch.float32, outputs)
    theirs = values_and_gradients(*given, "torch", torch.float64, outputs)
    for name, a, b in zip((*OUTPUTS, "sigmas' gradient", "values' gradient"), ours, theirs, strict=True):
        # float32 inputs: sigma dt and t have 6e-8 relative, and dt = t_end - t_start about 2e-5.
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) if len(b) else 0, msg=name
        )


CASES = {
    "no rays": [],
    "no samples": [0, 0, 0],
    "one": [1],
    "a few": [3, 0, 1, 16, 0, 17, 2],
    "many": [0, 100, 1, 33, 0],
    "more rays than a program has": [2, 0, 1] * 13,
}


@kernels
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_the_reference(counts):
    assert_agrees(case(counts))


@kernels
@pytest.mark.parametrize("density", [0.0, 1e-4, 1e3, 1e7])
def test_densities_of_any_size_do(density):
    assert_agrees(case(CASES["a few"], density=density))


@kernels
def test_an_opaque_sample_leaves_those_before_it_as_they_are():
    sigmas, *others = case([20])
    sigmas[10] = 1e25
    assert_agrees((sigmas, *others))


@kernels
@pytest.mark.parametrize("outputs", [[name] for name in OUTPUTS])
def test_each_gradient_is_that_of_the_reference(outputs):
    assert_agrees(case(CASES["a few"]), outputs)


@kernels
@pytest.mark.parametrize("channels", [1, 6, 9])
def test_any_number_of_channels_will_do(channels):
    assert_agrees(case(CASES["a few"], channels=channels))


@kernels
def test_a_thin_surface_far_away_has_its_variance():
    sigmas, values, samples, n_rays = case([20], density=300.0)
    ours = composite(*(x.to(DEVICE) for x in (sigmas, values, samples)), n_rays, "triton").z_variance
    exact = (x.to(DEVICE, torch.float64) for x in (sigmas, values))
    theirs = composite(*exact, in_dtype(samples, torch.float64), n_rays, "torch")
    torch.testing.assert_close(ours.double(), theirs.z_variance, rtol=1e-3, atol=0)


@kernels
def test_auto_trusts_the_kernels():
    assert OPERATION.agrees("triton", torch.device(DEVICE), 3)
