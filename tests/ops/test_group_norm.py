"""``add_norm``: what it computes, and that the Triton kernels agree with it, on a GPU or interpreted."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fourdfy.ops.group_norm import OPERATION, add, add_norm, bias_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.triton


def case(size=(2, 16, 5, 7), groups=4, *, mean=0.0, spread=1.0, dtype=torch.float64):
    """(x, bias, residual, norm)."""
    draw = torch.Generator().manual_seed(sum(size))
    x, residual = (torch.randn(size, generator=draw) * spread + mean for _ in range(2))
    norm = nn.GroupNorm(groups, size[1], eps=1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, generator=draw)
    norm = norm.requires_grad_(False).to(DEVICE, dtype)
    bias = torch.randn(size[1], generator=draw)
    x, bias, residual = (tensor.to(DEVICE, dtype) for tensor in (x, bias, residual))
    return x.requires_grad_(), bias, residual.requires_grad_(), norm


def outputs_and_gradients(x, bias, residual, norm, backend="torch", *, silu=True, keep_sum=True):
    """In float64; the outputs are weighted by fixed random numbers."""
    if keep_sum:
        outputs = add_norm(x, bias, residual, norm, silu=silu, backend=backend)
    else:
        outputs = [bias_norm(x, bias, norm, backend=backend)]
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=draw).to(x.device, x.dtype) for _ in outputs]
    wanted = [tensor for tensor in (x, residual) if tensor is not None]
    return [t.detach().double() for t in (*outputs, *torch.autograd.grad(outputs, wanted, weights))]


def assert_agree(inputs, atol=2e-5, **options):
    ours, expected = (outputs_and_gradients(*inputs, name, **options) for name in ("triton", "torch"))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol * theirs.abs().max().item(), rtol=0)


def test_it_is_torch_s_group_norm_of_a_sum():
    x, bias, residual, norm = case()
    normed, total = add_norm(x, bias, residual, norm)
    torch.testing.assert_close(total, x + residual + bias[None, :, None, None])
    torch.testing.assert_close(normed, F.silu(norm(total)))
    plain, total_of_two = add_norm(x, bias, None, norm, silu=False)
    torch.testing.assert_close(plain, norm(total_of_two))
    torch.testing.assert_close(bias_norm(x, bias, norm), F.silu(plain))
    assert torch.equal(add(x, bias, None), total_of_two)
    assert torch.equal(add(x, bias, residual), total)


@kernels
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_triton_agrees_with_torch(adds, silu):
    x, bias, residual, norm = case(dtype=torch.float32)
    assert_agree((x, bias, residual if adds else None, norm), silu=silu)


@kernels
def test_triton_agrees_with_torch_without_storing_the_sum():
    x, bias, _, norm = case(dtype=torch.float32)
    assert_agree((x, bias, None, norm), keep_sum=False)


@kernels
@pytest.mark.parametrize(
    ("size", "groups"),
    [
        ((1, 24, 33, 65), 8),  # channels and groups that fill no power of two; several splits of an image
        ((3, 6, 4, 4), 1),
        ((1, 4, 1, 2000), 2),
        ((1, 128, 9, 31), 32),
        ((2, 8192, 1, 2), 32),  # one pixel is more than a tile
    ],
)
def test_triton_agrees_with_torch_at_any_size(size, groups):
    x, bias, residual, norm = case(size, groups, dtype=torch.float32)
    assert_agree((x, bias, residual, norm))
    assert_agree((x, bias, None, norm), keep_sum=False)


@kernels
def test_triton_adds_as_torch_does():
    x, bias, residual, _ = case((2, 24, 33, 7), dtype=torch.float32)
    sums = [add(x, bias, residual, backend=backend) for backend in ("triton", "torch")]
    assert torch.equal(*sums)
    weights = torch.arange(float(sums[0].numel()), device=DEVICE).view_as(sums[0])
    for gradient in torch.autograd.grad(sums[0], (x, residual), weights):
        assert torch.equal(gradient, weights)


@kernels
@pytest.mark.parametrize("part", ["normed", "total"])
def test_an_output_that_nobody_uses_has_no_gradient(part):
    gradients = []
    for backend in ("triton", "torch"):
        x, bias, residual, norm = case(dtype=torch.float32)
        output = add_norm(x, bias, residual, norm, backend=backend)[part == "total"]
        gradients.append(torch.autograd.grad(output.square().sum(), (x, residual)))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


@kernels
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_a_mean_far_from_zero_costs_no_accuracy(mean):
    """Squares would have lost the deviations: 1000² has a last bit of 0.06 in float32."""
    x, bias, residual, norm = case((1, 16, 30, 31), mean=mean, dtype=torch.float32)
    ours = outputs_and_gradients(x, bias, residual, norm, "triton")
    exact = outputs_and_gradients(
        x.detach().double().requires_grad_(), bias.double(), residual.detach().double().requires_grad_(),
        norm.double(),
    )  # fmt: skip
    bits = 5e-4 if mean else 1e-5  # the sum itself is rounded: to 1e-4 at 2000, in units of its spread
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, atol=bits * theirs.abs().max().item(), rtol=0)


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 200.0])
def test_half_precision_is_rounded_once(dtype, spread):
    """Every step between is float32, so errors are those of rounding the inputs' sum and the results."""
    x, bias, residual, norm = case((1, 32, 12, 13), 8, spread=spread, dtype=dtype)
    ours = outputs_and_gradients(x, bias, residual, norm, "triton")
    exact = outputs_and_gradients(
        *(t.detach().double().requires_grad_(t.requires_grad) for t in (x, bias, residual)), norm.double()
    )
    bits = torch.finfo(dtype).eps
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).norm() < bits * theirs.norm()


@kernels
def test_a_variance_of_zero_divides_nothing_by_zero():
    """1 / standard deviation is 1000 there, and multiplies the last bits of everything."""
    for value in (0.0, 7.0):
        x, bias, residual, norm = case(dtype=torch.float32)
        x, residual = (torch.full_like(t, value).requires_grad_() for t in (x, residual))
        assert_agree((x, torch.zeros_like(bias), residual, norm), atol=1e-3)
    assert_agree(case((2, 8, 1, 1), 8, dtype=torch.float32), atol=1e-3)


@kernels
def test_any_memory_order_is_accepted():
    x, bias, residual, norm = case(dtype=torch.float32)
    ordered = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    ours = outputs_and_gradients(x, bias, residual, norm, "triton")
    assert all(map(torch.equal, ours, outputs_and_gradients(ordered, bias, residual, norm, "triton")))


@kernels
def test_working_kernels_are_trusted_in_every_dtype():
    for dtype in OPERATION.dtypes:
        assert OPERATION.agrees("triton", torch.device(DEVICE), dtype)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_what_triton_can_t_compute_is_refused():
    with pytest.raises(ValueError, match="up to 32 bits on CUDA, not torch"):
        add_norm(*case(dtype=torch.float64), backend="triton")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match=r"not torch\.float32 on cpu"):
            add_norm(*case(dtype=torch.float32), backend="triton")
