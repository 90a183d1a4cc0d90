"""Attention with one head of any width, such as that of an image VAE, which is as wide as its layers.

B images, T tokens, C channels.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.backends import Operation


def attention(
    q: Float[Tensor, "B T C"], k: Float[Tensor, "B T C"], v: Float[Tensor, "B T C"], backend: str = "auto"
) -> Float[Tensor, "B T C"]:
    """``softmax(q k^T / sqrt(C)) v``, the softmax in float32.

    Args:
        backend: ``auto`` selects triton on CUDA if it is installed, and torch otherwise.

    Raises:
        ValueError: the back end asked for is unknown, not installed or cannot compute this dtype here.
    """
    return OPERATION.select(backend, q, q.dtype).forward(q, k, v)


def _sample(module: ModuleType, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(2, 37, 64, generator=generator).to(device, dtype) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    mixed = module.forward(*inputs)
    return mixed.detach(), *torch.autograd.grad(mixed, inputs, weights)


OPERATION = Operation(
    name="attention",
    package=__name__,
    modules={"torch": ".reference", "triton": ".triton_gpu"},
    fastest={"cuda": "triton"},
    sample=_sample,
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    tolerance=1e-2,  # bfloat16 has 8 bits
)
