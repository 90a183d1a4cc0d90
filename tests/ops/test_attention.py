"""``attention``: what it computes, and that the Triton kernels agree with it, on a GPU or interpreted."""

import os
from importlib.util import find_spec

import pytest
import torch

from fourdfy.ops.attention import OPERATION, attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.triton


def case(images=2, tokens=13, channels=8, *, spread=1.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(tokens)
    return [
        (torch.randn(images, tokens, channels, generator=draw) * spread).to(DEVICE, dtype).requires_grad_()
        for _ in range(3)
    ]


def values_and_gradients(inputs, backend):
    mixed = attention(*inputs, backend)
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(mixed.shape, generator=draw).to(mixed)
    return [t.detach().double() for t in (mixed, *torch.autograd.grad(mixed, inputs, weights))]


def in_float64(inputs):
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def test_it_is_the_mean_of_the_values_weighted_by_a_softmax():
    q, k, v = in_float64(case())
    weights = torch.softmax(q @ k.mT / 8**0.5, -1)
    torch.testing.assert_close(attention(q, k, v), weights @ v)


@kernels
@pytest.mark.parametrize("tokens", [1, 13, 64, 129])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0], ids=["even", "usual", "one weight is nearly 1"])
def test_triton_agrees_with_torch(tokens, spread):
    inputs = case(tokens=tokens, spread=spread)
    exact = values_and_gradients(in_float64(inputs), "torch")
    size = max(tensor.abs().max() for tensor in exact).item()
    for mine, theirs in zip(values_and_gradients(inputs, "triton"), exact, strict=True):
        # products of size spread^2, of which float32 has 7 digits, are exponents
        torch.testing.assert_close(mine, theirs, atol=2e-6 * (1 + spread**2) * size, rtol=0)


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_weights_and_results_only(dtype):
    inputs = case(tokens=50, channels=32, spread=2.0, dtype=dtype)
    exact = values_and_gradients(in_float64(inputs), "torch")
    for mine, theirs in zip(values_and_gradients(inputs, "triton"), exact, strict=True):
        assert (mine - theirs).norm() < 2 * torch.finfo(dtype).eps * theirs.norm()


@kernels
def test_scores_beyond_half_precision_are_no_infinities():
    inputs = case(channels=32, spread=100.0, dtype=torch.float16)
    products = inputs[0].double() @ inputs[1].double().mT
    assert products.abs().max() > torch.finfo(torch.float16).max
    for result in values_and_gradients(inputs, "triton"):
        assert result.isfinite().all()


@kernels
def test_tokens_of_any_memory_order_are_accepted():
    inputs = case()
    strided = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in inputs]
    for mine, theirs in zip(
        values_and_gradients(strided, "triton"), values_and_gradients(inputs, "triton"), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@kernels
def test_working_kernels_are_trusted_in_every_dtype():
    for dtype in OPERATION.dtypes:
        assert OPERATION.agrees("triton", torch.device(DEVICE), dtype)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_what_triton_can_t_compute_is_refused():
    with pytest.raises(ValueError, match="up to 32 bits on CUDA, not torch"):
        attention(*case(dtype=torch.float64), "triton")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match=r"not torch\.float32 on cpu"):
            attention(*case(dtype=torch.float32), "triton")
