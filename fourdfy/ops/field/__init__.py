"""The space-time field of 4D-fy: two hash grids, added, and a small network that reads them, in one call.

N points, P and Q parameters of the grids over space and over space and time (``spec``, ``over_time(spec)``),
C = L*F features of a point, H hidden neurons, K outputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.backends import REFERENCE, Operation
from fourdfy.ops.hash_grid.spec import HashGridSpec, over_time
from fourdfy.ops.mlp import LARGEST


def field(
    x: Float[Tensor, "N 3"],
    times: Float[Tensor, "N"],
    space: Float[Tensor, "P"],
    space_time: Float[Tensor, "Q"],
    spec: HashGridSpec,
    hidden: Float[Tensor, "H C"],
    output: Float[Tensor, "K H"],
    backend: str = "auto",
) -> Float[Tensor, "N K"]:
    """``mlp(hash_grid(x) + hash_grid([x, times]))``, differentiable in the tables and weights alone.

    Triton keeps 144 bytes of a point for the backward pass, and is fastest where neighbouring points have the
    same time.

    Args:
        x: points, nominally in the unit cube; see ``hash_grid``.
        backend: ``auto`` selects triton where ``serves`` says so, and torch otherwise.

    Raises:
        ValueError: the back end asked for is unknown, not installed or cannot compute this.
    """
    module = OPERATION.select(backend, x, (spec, hidden.shape[1], len(hidden), len(output)))
    return module.forward(x, times, space, space_time, spec, hidden, output)


def serves(x: Tensor, spec: HashGridSpec, sizes: tuple[int, int, int]) -> bool:
    """Whether a fast back end has these points' field; ``sizes`` are inputs, hidden neurons and outputs."""
    return (
        spec.n_input_dims == 3
        and spec.n_features_per_level == 2
        and all(size <= limit for size, limit in zip(sizes, LARGEST, strict=True))
        and not x.requires_grad
        and OPERATION.pick(x) != REFERENCE
        and OPERATION.agrees(OPERATION.pick(x), x.device, (spec, *sizes))
    )


def _sample(
    module: ModuleType, device: torch.device, family: tuple[HashGridSpec, int, int, int]
) -> tuple[Tensor, ...]:
    """Outputs and gradients of points at two times, some outside the cube, with and without slices."""
    spec, n_inputs, n_hidden, n_outputs = family
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(512, 3, generator=generator) * 1.2 - 0.1).to(device)
    times = torch.tensor([0.3, 0.7]).repeat_interleave(256).to(device)
    shapes = (spec.n_params,), (over_time(spec).n_params,), (n_hidden, n_inputs), (n_outputs, n_hidden)
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    weights = torch.randn(512, n_outputs, generator=generator).to(device)
    space, space_time, *networks = inputs
    results = []
    for slices in (False, True):
        outputs = module.forward(x, times, space, space_time, spec, *networks, slices=slices)
        results += [outputs.detach(), *torch.autograd.grad(outputs, inputs, weights)]
    return tuple(results)


OPERATION = Operation(
    name="space-time field",
    package=__name__,
    modules={"torch": ".reference", "triton": ".triton_gpu"},
    fastest={"cuda": "triton"},
    sample=_sample,
    unrepeatable=("triton",),
)
