"""Activations by the names that threestudio's YAML files use; elementwise, any shape."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def get_activation(name: str | None) -> Activation:
    """The function called ``name``; None and ``none`` are the identity.

    Raises:
        ValueError: no such activation; names the nearest.
    """
    key = "none" if name is None else name.lower()
    if key in ACTIVATIONS:
        return ACTIVATIONS[key]
    guess = difflib.get_close_matches(key, ACTIVATIONS, n=1)
    hint = f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(sorted(ACTIVATIONS))}"
    raise ValueError(f"no activation is called {name!r}; {hint}")


def trunc_exp(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """exp whose gradient stops growing at x = 15 (as in instant-ngp), so that no outlier ruins a step."""
    return _TruncExp.apply(x)


def linear_to_srgb(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """IEC 61966-2-1, clamped to 0..1."""
    curve = 1.055 * x.clamp(min=0.0031308) ** (1 / 2.4) - 0.055  # clamped: a root's slope at 0 is infinite
    return torch.where(x > 0.0031308, curve, 12.92 * x).clamp(0, 1)


class _TruncExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.clamp(max=15).exp()


TORCH = (
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu",
    "relu6", "selu", "silu", "softplus", "softsign",
)  # fmt: skip
"""Activations of ``torch.nn.functional``, with its defaults."""

ACTIVATIONS: dict[str, Activation] = {
    **{name: getattr(functional, name) for name in TORCH},
    "none": lambda x: x,
    "exp": torch.exp,
    "shifted_exp": lambda x: torch.exp(x - 1),
    "trunc_exp": trunc_exp,
    "shifted_trunc_exp": lambda x: trunc_exp(x - 1),
    "shifted_softplus": lambda x: functional.softplus(x - 1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "lin2srgb": linear_to_srgb,
    "scale_-11_01": lambda x: x * 0.5 + 0.5,
}
