"""The small network in plain torch: the definition that every other back end must agree with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, relu


def forward(
    x: Float[Tensor, "N C"], hidden: Float[Tensor, "H C"], output: Float[Tensor, "K H"]
) -> Float[Tensor, "N K"]:
    """See ``mlp``. Autograd computes the gradients, of any order."""
    return linear(relu(linear(x, hidden), inplace=True), output)


def gradients(
    inputs: Sequence[Tensor], grad_outputs: Float[Tensor, "N K"], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of ``forward``'s inputs that are needed; they can be differentiated again."""
    learning = [tensor for tensor, wants in zip(inputs, wanted, strict=True) if wants]
    found = iter(torch.autograd.grad(forward(*inputs), learning, grad_outputs, create_graph=True))
    return [next(found) if wants else None for wants in wanted]
