"""The hash grid in Triton agrees with the torch reference: on a GPU where there is one, else interpreted."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fourdfy.ops import backends
from fourdfy.ops.backends import Operation
from fourdfy.ops.hash_grid import OPERATION, hash_grid, reference
from fourdfy.ops.hash_grid.spec import HashGridSpec
from tests.ops.test_hash_grid import random_case

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.triton


def case(n_points: int, **numbers):
    spec = HashGridSpec(**{"n_levels": 3, "log2_hashmap_size": 9, "base_resolution": 6} | numbers)
    x, params = random_case(n_points, spec)
    return x.to(DEVICE), params.to(DEVICE), spec


def features_and_gradients(x, params, spec, backend):
    x, params = x.detach().clone().requires_grad_(), params.detach().clone().requires_grad_()
    features = hash_grid(x, params, spec, backend)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return features, *torch.autograd.grad((features * weights).sum(), (x, params))


def assert_agree(x, params, spec):
    by_triton, by_torch = (features_and_gradients(x, params, spec, name) for name in ("triton", "torch"))
    # a few last bits of float32: of weights in 0..1, of slopes up to some 100, of sums of some 100 numbers
    for ours, expected, bits in zip(by_triton, by_torch, (1e-5, 1e-3, 1e-3), strict=True):
        torch.testing.assert_close(ours, expected, atol=bits, rtol=1e-5)


# Agreement


@kernels
@pytest.mark.parametrize(
    ("n_dims", "n_features", "n_points"),
    [
        (3, 1, 300),
        (3, 2, 257),
        (3, 4, 65),
        (3, 8, 20),
        (4, 1, 129),
        (4, 2, 70),
        (4, 4, 1),
        (2, 3, 9),
        (6, 5, 5),
    ],
)
def test_triton_agrees_with_torch(n_dims, n_features, n_points):
    """Blocks that are not full; features and axes that fill no power of two; points outside the cube."""
    x, params, spec = case(n_points, n_input_dims=n_dims, n_features_per_level=n_features)
    assert_agree(x, params, spec)


@kernels
@pytest.mark.parametrize("n_dims", [3, 4])
def test_triton_agrees_with_torch_on_dense_levels(n_dims):
    x, params, spec = case(40, n_input_dims=n_dims, n_levels=2, log2_hashmap_size=13)
    assert not any(level.hashed for level in spec.levels)
    assert_agree(x, params, spec)


@kernels
@pytest.mark.parametrize("where", [-400.0, -2.0, 2.0, 40.0])
@pytest.mark.parametrize("log2_hashmap_size", [4, 12], ids=["hashed", "dense"])
def test_triton_agrees_with_torch_far_outside_the_cube(log2_hashmap_size, where):
    """There 32-bit indices wrap around, and pass the level's end several times over."""
    numbers = {"n_levels": 1, "base_resolution": 4, "log2_hashmap_size": log2_hashmap_size}
    x, params, spec = case(3, **numbers)
    assert spec.levels[0].hashed == (log2_hashmap_size == 4)
    assert_agree(x + where, params, spec)


@kernels
def test_no_points_have_no_features_and_a_parameter_gradient_of_zeros():
    x, params, spec = case(0)
    features, grad_x, grad_params = features_and_gradients(x, params, spec, "triton")
    assert features.shape == (0, 6)
    assert grad_x.shape == (0, 3)
    assert not grad_params.any()


@kernels
def test_triton_accepts_strided_points_and_gradients():
    x, params, spec = case(20)
    strided = x.t().contiguous().t()
    params.requires_grad_()
    features = hash_grid(strided, params, spec, "triton")
    assert torch.equal(features, hash_grid(x, params, spec, "triton"))
    (summed,) = torch.autograd.grad(features.sum(), params)  # sum()'s gradient is an expanded scalar
    expected = torch.autograd.grad(hash_grid(x, params, spec, "torch").sum(), params)[0]
    torch.testing.assert_close(summed, expected, atol=1e-4, rtol=1e-5)


@kernels
def test_a_gradient_through_the_gradient_is_the_reference_one():
    """What training with analytic normals needs."""
    x, params, spec = case(30)
    results = []
    for backend in ("triton", "torch"):
        point, leaf = x.clone().requires_grad_(), params.clone().requires_grad_()
        energy = hash_grid(point, leaf, spec, backend).square().sum()
        (slope,) = torch.autograd.grad(energy, point, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), (point, leaf)))
    for by_triton, by_torch in zip(*results, strict=True):
        torch.testing.assert_close(by_triton, by_torch, rtol=1e-4, atol=1e-4 * by_torch.abs().max().item())


@kernels
@pytest.mark.parametrize("trained", ["x", "params"])
def test_only_the_gradient_asked_for_is_computed(monkeypatch, trained):
    from fourdfy.ops.hash_grid import triton_gpu

    launch, launched = triton_gpu._launch, []
    monkeypatch.setattr(
        triton_gpu, "_launch", lambda kernel, *args: (launched.append(kernel), launch(kernel, *args))
    )
    x, params, spec = case(5)
    leaf = {"x": x, "params": params}[trained].requires_grad_()
    hash_grid(x, params, spec, "triton").sum().backward()
    gradient = {"x": triton_gpu._differentiate, "params": triton_gpu._scatter}[trained]
    assert launched == [triton_gpu._interpolate, gradient]
    assert leaf.grad.any()


@kernels
def test_a_deterministic_parameter_gradient_is_refused():
    x, params, spec = case(5)
    features = hash_grid(x, params.requires_grad_(), spec, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="use backend=auto or torch"):
            features.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


# Choice


@kernels
def test_triton_refuses_float64():
    x, params, spec = case(5)
    with pytest.raises(ValueError, match=r"computes float32 on CUDA, not torch\.float64 on"):
        hash_grid(x.double(), params.double(), spec, "triton")


@kernels
def test_triton_refuses_the_cpu(monkeypatch):
    from fourdfy.ops.hash_grid import triton_gpu

    monkeypatch.setattr(triton_gpu, "_is_interpreted", lambda: False)
    x, params, spec = case(5)
    with pytest.raises(ValueError, match=r"computes float32 on CUDA, not torch\.float32 on cpu"):
        hash_grid(x.cpu(), params.cpu(), spec, "triton")


@pytest.mark.parametrize(
    ("dtype", "installed", "deterministic", "expected"),
    [
        (torch.float32, True, False, "triton"),
        (torch.float64, True, False, "torch"),
        (torch.float32, False, False, "torch"),
        (torch.float32, True, True, "torch"),
    ],
)
def test_auto_on_cuda(monkeypatch, dtype, installed, deterministic, expected):
    monkeypatch.setattr(backends, "is_installed", lambda name: installed)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    with FakeTensorMode():  # a CUDA tensor where there is no CUDA
        assert OPERATION.pick(torch.empty(1, 3, device="cuda", dtype=dtype)) == expected


# Trusting it


@kernels
def test_working_kernels_are_trusted():
    assert OPERATION.agrees("triton", torch.device(DEVICE), HashGridSpec(n_input_dims=3, n_levels=2))


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, params, spec: reference.forward(x, params, spec) * 1.01,
        lambda x, params, spec: reference.forward(x.detach(), params, spec) + 0 * x.sum(),
        lambda x, params, spec: (_ for _ in ()).throw(RuntimeError("no kernel image")),
    ],
    ids=["features", "position gradient", "launch"],
)
def test_broken_kernels_are_not_trusted_and_said_so(broken, monkeypatch, caplog):
    monkeypatch.setattr(Operation, "pick", lambda operation, x: "triton")
    load = Operation.load
    monkeypatch.setattr(
        Operation,
        "load",
        lambda operation, name: (
            SimpleNamespace(forward=broken) if name == "triton" else load(operation, name)
        ),
    )
    Operation.agrees.cache_clear()
    backends._log_once.cache_clear()
    spec = HashGridSpec(n_input_dims=3, n_levels=2, log2_hashmap_size=9)
    x, params = random_case(5, spec)
    with caplog.at_level("DEBUG", "fourdfy"):
        assert torch.equal(hash_grid(x, params, spec), reference.forward(x, params, spec))
    Operation.agrees.cache_clear()
    assert "does not work here" in caplog.text
    assert "torch back end for" in caplog.text and "triton back end for" not in caplog.text


def test_no_kernel_argument_has_a_name_of_triton_s_launcher():
    """Its launcher is generated code with names of its own; an argument of such a name never arrives."""
    source = ast.parse((ROOT / "fourdfy/ops/hash_grid/triton_gpu.py").read_text())
    for function in (node for node in ast.walk(source) if isinstance(node, ast.FunctionDef)):
        if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
            names = {argument.arg for argument in function.args.args}
            assert not names & {"params", "options", "specialization"}, function.name
