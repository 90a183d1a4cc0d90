"""The small network in Triton agrees with the reference: on a GPU where there is one, else interpreted."""

import pytest
import torch

from fourdfy.ops.mlp import LARGEST, OPERATION, mlp, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.triton


def case(n_points: int, n_inputs: int = 32, n_hidden: int = 64, n_outputs: int = 3):
    """Points and weights, learning, whose gradient is not that of a sum."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n_points, n_inputs), (n_hidden, n_inputs), (n_outputs, n_hidden)
    return [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]


def outputs_and_gradients(inputs, backend):
    outputs = mlp(*inputs, backend)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return outputs.detach(), *torch.autograd.grad(outputs, inputs, weights)


@kernels
@pytest.mark.parametrize(
    ("n_points", "sizes"),
    [
        (1, (32, 64, 1)),
        (64, (32, 64, 3)),
        (200, (32, 128, 4)),
        (70, (17, 40, 5)),
        (65, (3, 200, 16)),
        (0, (8, 64, 2)),
    ],
)
def test_triton_agrees_with_torch(n_points, sizes):
    """Blocks that are not full; inputs, neurons and outputs that fill no tile; several chunks."""
    inputs = case(n_points, *sizes)
    for ours, exact in zip(
        outputs_and_gradients(inputs, "triton"), outputs_and_gradients(inputs, "torch"), strict=True
    ):
        # sums of up to 200 products of size 1: float32's last bits, and far below TF32's 1e-3
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
def test_a_million_points_on_the_gpu_are_as_exact_as_float32():
    """Against float64. Plain TF32 has relative errors of some 1e-4."""
    inputs = case(1_000_003, 32, 128, 4)
    ours = outputs_and_gradients(inputs, "triton")
    exact = outputs_and_gradients([tensor.detach().double().requires_grad_() for tensor in inputs], "torch")
    # Weights sum a million terms of both signs, of which one or two per neuron are at the ReLU's corner.
    for one, other, bound in zip(ours, exact, (2e-6, 2e-6, 1e-3, 1e-3), strict=True):
        assert (one - other).abs().mean() < bound * other.abs().mean()


@kernels
def test_a_gradient_through_the_gradient_is_the_reference_one():
    inputs, results = case(20), []
    for backend in ("triton", "torch"):
        energy = mlp(*inputs, backend).square().sum()
        (slope,) = torch.autograd.grad(energy, inputs[0], create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), inputs))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@kernels
@pytest.mark.parametrize("trained", range(3))
def test_only_the_gradients_asked_for_are_computed(trained, monkeypatch):
    from fourdfy.ops.mlp import triton_gpu

    launch, launched = triton_gpu._launch, []
    monkeypatch.setattr(
        triton_gpu, "_launch", lambda kernel, *args: (launched.append(kernel), launch(kernel, *args))
    )
    inputs = [tensor.detach() for tensor in case(5)]
    inputs[trained].requires_grad_()
    mlp(*inputs, "triton").sum().backward()
    gradient = triton_gpu._to_inputs if trained == 0 else triton_gpu._to_weights
    assert launched == [triton_gpu._evaluate, gradient]
    assert inputs[trained].grad.any()


@kernels
def test_a_point_that_is_not_a_number_stays_one():
    x, *weights = (tensor.detach() for tensor in case(5))
    x[2] = torch.nan
    assert mlp(x, *weights, "triton").isnan().all(dim=1).tolist() == [False, False, True, False, False]


@kernels
def test_the_input_s_gradient_can_take_its_place():
    from fourdfy.ops.mlp import triton_gpu

    x, *weights = (tensor.detach() for tensor in case(100))
    upstream = torch.randn(100, 3).to(DEVICE)
    expected = triton_gpu.input_gradient(x[None], *weights, upstream)
    triton_gpu.input_gradient(x[None], *weights, upstream, into=x[None])
    assert torch.equal(x[None], expected)


@kernels
def test_triton_refuses_float64():
    with pytest.raises(ValueError, match=r"computes float32 on CUDA, not torch\.float64 on"):
        mlp(*(tensor.double() for tensor in case(5)), "triton")


@kernels
def test_working_kernels_are_trusted():
    assert OPERATION.agrees("triton", torch.device(DEVICE), (32, 128, 4))


def test_auto_gives_large_networks_to_torch(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        type(OPERATION), "select", lambda operation, backend, *_: (chosen.append(backend), reference)[1]
    )
    n_inputs, n_hidden, n_outputs = LARGEST
    for sizes in ((n_inputs, n_hidden, n_outputs), (n_inputs + 1, 8, 1), (8, n_hidden + 1, 1), (8, 8, 17)):
        mlp(*case(2, *sizes))
    assert chosen == ["auto", "torch", "torch", "torch"]
