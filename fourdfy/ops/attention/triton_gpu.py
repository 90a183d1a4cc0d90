"""``attention`` on CUDA by plain matrix products, with the softmax between them in Triton.

PyTorch's kernels never store the weights of all pairs of tokens, and pay for it: they have none for wide
heads but the slowest. Here the weights are kept for the backward pass, and twice as much is needed for a
while: 6 T^2 bytes an image in 16 bits.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl


def forward(
    q: Float[Tensor, "B T C"], k: Float[Tensor, "B T C"], v: Float[Tensor, "B T C"]
) -> Float[Tensor, "B T C"]:
    """See ``attention``. Runs on the CPU under ``TRITON_INTERPRET=1``, which is for tests.

    Raises:
        ValueError: float64, or not on CUDA.
    """
    interpreted = not isinstance(_softmax, triton.JITFunction)
    if q.dtype == torch.float64 or not (q.is_cuda or interpreted):
        raise ValueError(
            f"the triton back end computes up to 32 bits on CUDA, not {q.dtype} on {q.device}; "
            f"use backend=auto"
        )
    return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        scores = _products(q, k)
        weights = torch.empty_like(scores, dtype=q.dtype)
        _launch(_softmax, scores, weights, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        grad_weights = _products(grad, v)
        grad_scores = torch.empty_like(weights)
        _launch(_grad_softmax, grad_weights, weights, grad_scores, q.shape[-1] ** -0.5)
        return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad


def _products(rows: Float[Tensor, "B T C"], others: Float[Tensor, "B T C"]) -> Float[Tensor, "B T T"]:
    """Of all pairs, in float32."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.bmm(rows, others.mT, out_dtype=torch.float32)
    return rows.float() @ others.float().mT


def _launch(kernel, *arguments) -> None:
    """A program for each row of [B, T, T]."""
    images, tokens, _ = arguments[0].shape
    padded = triton.next_power_of_2(tokens)
    with torch.cuda.device_of(arguments[0]):
        kernel[images * tokens,](*arguments, tokens, TP=padded, num_warps=min(16, max(1, padded // 512)))


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: Triton compiles a function, not a checking wrapper around it.


@triton.jit
@no_type_check
def _softmax(scores, weights, factor, tokens, TP: tl.constexpr):
    at, mask = _row(tokens, TP)
    values = tl.load(scores + at, mask=mask, other=float("-inf")) * factor
    values = tl.exp(values - tl.max(values))
    tl.store(weights + at, (values / tl.sum(values)).to(weights.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _grad_softmax(grad_weights, weights, grad_scores, factor, tokens, TP: tl.constexpr):
    at, mask = _row(tokens, TP)
    grads = tl.load(grad_weights + at, mask=mask, other=0.0)
    values = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)
    grads = values * (grads - tl.sum(values * grads)) * factor
    tl.store(grad_scores + at, grads.to(grad_scores.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _row(tokens, TP: tl.constexpr):
    """Where this program's numbers are [TP], and which of them exist."""
    t = tl.arange(0, TP)
    return tl.program_id(0).to(tl.int64) * tokens + t, t < tokens
