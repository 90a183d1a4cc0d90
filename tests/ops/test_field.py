"""The space-time field in Triton agrees with the reference: on a GPU where there is one, else interpreted."""

import pytest
import torch

from fourdfy.ops.field import OPERATION, field, reference, serves
from fourdfy.ops.hash_grid.spec import HashGridSpec, over_time

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.triton


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that few points fill several blocks; on a GPU they are as large as in use."""
    if DEVICE == "cpu":
        module = OPERATION.load("triton")
        monkeypatch.setattr(module, "RUN", 3)
        monkeypatch.setattr(module, "TILE", 256)


def case(n_points: int, times: list[float], n_levels: int = 4, **numbers):
    """Points of which some lie outside the cube, at times in runs, and what learns."""
    spec = HashGridSpec(
        n_levels=n_levels, **{"log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5} | numbers
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n_points, 3, generator=generator) * 1.6 - 0.3
    moments = torch.tensor(times).repeat_interleave(-(-n_points // len(times)))[:n_points]
    shapes = (spec.n_params,), (over_time(spec).n_params,), (32, spec.n_output_dims), (4, 32)
    learning = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    return x.to(DEVICE), moments.to(DEVICE), spec, learning


def results(module, x, times, spec, learning, **options):
    space, space_time, *networks = learning
    outputs = module.forward(x, times, space, space_time, spec, *networks, **options)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return outputs.detach(), *torch.autograd.grad(outputs, learning, weights)


def assert_agree(x, times, spec, learning, **options):
    ours = results(OPERATION.load("triton"), x, times, spec, learning, **options)
    for one, exact in zip(ours, results(reference, x, times, spec, learning), strict=True):
        # the last bits of float32 sums of some hundred numbers of size 1
        torch.testing.assert_close(one, exact, atol=2e-4, rtol=1e-5)


@kernels
@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize(
    ("n_points", "times"),
    [
        (70, [0.1, 0.5, 0.9]),
        (40, [0.3]),
        (60, [-2.0, 0.0, 1.5, 0.0]),
        (1, [0.5]),
        (0, [0.5]),
        (64, [i / 40 for i in range(40)]),
    ],
    ids=["three", "one", "outside, and one again", "one point", "no point", "too many"],
)
def test_triton_agrees_with_torch(n_points, times, slices):
    """Levels of all three kinds: dense in both grids, hashed over time alone, hashed in both."""
    x, moments, spec, learning = case(n_points, times)
    kinds = [(a.hashed, b.hashed) for a, b in zip(spec.levels, over_time(spec).levels, strict=True)]
    assert set(kinds) == {(False, True), (True, True), (False, False)}
    assert_agree(x, moments, spec, learning, slices=slices)


@kernels
def test_triton_agrees_with_torch_where_no_level_is_hashed():
    assert_agree(*case(40, [0.2, 0.8], n_levels=2, log2_hashmap_size=12), slices=True)


@kernels
def test_triton_agrees_with_torch_far_outside_the_cube():
    """There 32-bit indices wrap around, and pass a level's end several times over."""
    x, *rest = case(24, [0.2, 0.8])
    assert_agree(x * 100 - 40, *rest, slices=True)


@kernels
def test_triton_agrees_with_torch_at_cell_borders():
    x, times, spec, learning = case(27, [0.5])
    level = spec.levels[2]
    x = ((x * level.scale).round() - 0.5) / level.scale
    space, space_time, *networks = (tensor.detach() for tensor in learning)
    arguments = x, times, space, space_time, spec, *networks
    for slices in (False, True):
        ours = OPERATION.load("triton").forward(*arguments, slices=slices)
        torch.testing.assert_close(ours, reference.forward(*arguments), atol=1e-4, rtol=1e-5)


@kernels
@pytest.mark.parametrize("trained", range(4))
@pytest.mark.parametrize("slices", [False, True])
def test_each_gradient_is_right_by_itself(trained, slices):
    """Half of the scene is often frozen."""
    x, times, spec, learning = case(16, [0.1, 0.6])
    for k, tensor in enumerate(learning):
        tensor.requires_grad_(k == trained)
    expected, ours = (
        torch.autograd.grad(
            module.forward(x, times, learning[0], learning[1], spec, *learning[2:], slices=slices).sum(),
            learning[trained],
        )[0]
        for module in (reference, OPERATION.load("triton"))
    )
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-5)


@kernels
def test_a_graph_can_be_used_twice():
    """The first backward pass writes the features' gradient over them."""
    x, times, spec, (space, space_time, *networks) = case(16, [0.1, 0.6])
    outputs = OPERATION.load("triton").forward(x, times, space, space_time, spec, *networks)
    features = outputs.grad_fn.features
    before, energy = features.clone(), outputs.square().sum()
    first, second = (torch.autograd.grad(energy, space, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    assert not torch.equal(features, before)


@kernels
def test_nothing_but_points_and_features_is_kept():
    x, times, spec, (space, space_time, *networks) = case(16, [0.1])
    outputs = OPERATION.load("triton").forward(x, times, space, space_time, spec, *networks)
    of_points = [tensor for tensor in outputs.grad_fn.saved_tensors if len(tensor) == len(x)]
    assert sum(tensor.numel() for tensor in of_points) == 4 * len(x)
    assert outputs.grad_fn.features.numel() == spec.n_output_dims * len(x)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA; takes ten seconds interpreted")
def test_working_kernels_are_trusted():
    spec = HashGridSpec(n_levels=4, log2_hashmap_size=10)
    assert OPERATION.agrees("triton", torch.device(DEVICE), (spec, 8, 32, 4))


@kernels
def test_other_numbers_of_features_and_dtypes_are_refused():
    x, times, spec, (space, space_time, *networks) = case(5, [0.1])
    with pytest.raises(ValueError, match="computes float32 on CUDA"):
        field(x.double(), times, space, space_time, spec, *networks, "triton")
    with pytest.raises(ValueError, match="n_features_per_level=4: the field's kernels expect 2"):
        wide = HashGridSpec(n_levels=5, n_features_per_level=4)
        field(x, times, space, space_time, wide, *networks, "triton")


def test_the_reference_serves_the_cpu():
    x, times, spec, (space, space_time, *networks) = case(5, [0.1])
    if DEVICE == "cpu":
        assert not serves(x, spec, (10, 32, 4))
    outputs = field(x, times, space, space_time, spec, *networks, "torch")
    assert torch.equal(outputs, reference.forward(x, times, space, space_time, spec, *networks))
