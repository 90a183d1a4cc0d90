"""A network of one hidden layer with ReLU and no biases, whose hidden activations are not kept.

N points, C inputs, H hidden neurons, K outputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.backends import REFERENCE, Operation

LARGEST = (64, 256, 16)
"""Inputs, hidden neurons and outputs of the largest network that ``auto`` gives to a fast back end."""


def mlp(
    x: Float[Tensor, "N C"], hidden: Float[Tensor, "H C"], output: Float[Tensor, "K H"], backend: str = "auto"
) -> Float[Tensor, "N K"]:
    """``output @ relu(hidden @ x)`` of each point, differentiable in all three.

    Args:
        backend: ``auto`` selects triton for float32 on CUDA if it is installed and the network is at most
            ``LARGEST``, and torch otherwise. Triton keeps nothing but its inputs for the backward pass and
            multiplies in TF32 three times over, as accurate as float32.

    Raises:
        ValueError: the back end asked for is unknown, not installed or cannot compute this dtype here.
    """
    sizes = (x.shape[1], *reversed(output.shape))
    if backend == "auto" and any(size > limit for size, limit in zip(sizes, LARGEST, strict=True)):
        backend = REFERENCE
    return OPERATION.select(backend, x, sizes).forward(x, hidden, output)


def _sample(module: ModuleType, device: torch.device, sizes: tuple[int, int, int]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    n_inputs, n_hidden, n_outputs = sizes
    shapes = (300, n_inputs), (n_hidden, n_inputs), (n_outputs, n_hidden)
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    weights = torch.randn(300, n_outputs, generator=generator).to(device)
    outputs = module.forward(*inputs)
    return outputs.detach(), *torch.autograd.grad(outputs, inputs, weights)


OPERATION = Operation(
    name="small network",
    package=__name__,
    modules={"torch": ".reference", "triton": ".triton_gpu"},
    fastest={"cuda": "triton"},
    sample=_sample,
)
