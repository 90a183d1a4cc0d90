"""Group norm (Wu & He 2018) of a sum, with or without SiLU behind it, for networks with frozen weights.

B images, C channels in G groups, H x W pixels.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.ops.backends import Operation


def add_norm(
    x: Float[Tensor, "B C H W"],
    bias: Float[Tensor, "C"],
    residual: Float[Tensor, "B C H W"] | None,
    norm: nn.GroupNorm,
    *,
    silu: bool = True,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """(``norm(x + bias + residual)``, with SiLU if asked; the sum itself).

    Gradients reach ``x`` and ``residual`` alone. Statistics are computed in float32, in every dtype.

    Args:
        x: usually a convolution's output, before its bias; channels last for speed.
        norm: with scale and shift.
        backend: ``auto`` selects triton on CUDA if it is installed, and torch otherwise.

    Raises:
        ValueError: the back end asked for is unknown, not installed or cannot compute this dtype here.
    """
    module = OPERATION.select(backend, x, x.dtype)
    return module.add_norm(x, bias, residual, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def bias_norm(
    x: Float[Tensor, "B C H W"], bias: Float[Tensor, "C"], norm: nn.GroupNorm, *, backend: str = "auto"
) -> Float[Tensor, "B C H W"]:
    """``norm(x + bias)`` with SiLU, as ``add_norm`` computes it, without storing the sum."""
    module = OPERATION.select(backend, x, x.dtype)
    return module.bias_norm(x, bias, norm.weight, norm.bias, norm.num_groups, norm.eps)


def add(
    x: Float[Tensor, "B C H W"],
    bias: Float[Tensor, "C"],
    residual: Float[Tensor, "B C H W"] | None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "B C H W"]:
    """``x + bias + residual`` as ``add_norm`` computes it, where no norm follows."""
    return OPERATION.select(backend, x, x.dtype).add(x, bias, residual)


def _sample(module: ModuleType, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Values and gradients of a few pixels, far from zero mean."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    def pixels() -> Tensor:
        return draw(2, 32, 9, 7).to(memory_format=torch.channels_last).requires_grad_()

    x, residual, bias, norm = pixels(), pixels(), draw(32) + 3, (draw(32), draw(32), 8, 1e-6)
    outputs = [
        *module.add_norm(x, bias, residual, *norm, True),
        *module.add_norm(x, bias, residual, *norm, False),
        module.bias_norm(x, bias, *norm),
        module.add(x, bias, residual),
    ]
    gradients = torch.autograd.grad(outputs, (x, residual), [draw(2, 32, 9, 7) for _ in outputs])
    return *(output.detach() for output in outputs), *gradients


OPERATION = Operation(
    name="group norm",
    package=__name__,
    modules={"torch": ".reference", "triton": ".triton_gpu"},
    fastest={"cuda": "triton"},
    sample=_sample,
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    tolerance=1e-2,  # bfloat16 has 8 bits
)
