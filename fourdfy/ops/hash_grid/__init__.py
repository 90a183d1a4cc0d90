"""Multiresolution hash grid (Mueller et al. 2022): one definition, three back ends.

N points, D dimensions of a point, K features of a point, P parameters over all levels (``spec``).
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.backends import Operation
from fourdfy.ops.hash_grid.spec import HashGridSpec


def hash_grid(
    x: Float[Tensor, "N D"], params: Float[Tensor, "P"], spec: HashGridSpec, backend: str = "auto"
) -> Float[Tensor, "N K"]:
    """Linearly interpolated features, level by level, differentiable in ``x`` and ``params``.

    Args:
        x: points, nominally in the unit cube. Nothing is clamped: outside of it, dense levels wrap
            around and hashed ones continue.
        params: ``spec.n_params`` numbers, coarse to fine; the same for all back ends.
        backend: ``auto`` selects, for float32, numba on the CPU and triton on CUDA if they are installed,
            and torch otherwise, and on CUDA under ``torch.use_deterministic_algorithms``.

    Raises:
        ValueError: shapes, dtypes or devices do not match the spec or each other; the back end asked
            for is unknown, not installed or cannot compute this dtype on this device.
    """
    if x.ndim != 2 or x.shape[1] != spec.n_input_dims:
        raise ValueError(f"points of shape {tuple(x.shape)}: the grid expects [N, {spec.n_input_dims}]")
    if params.shape != (spec.n_params,):
        raise ValueError(f"params of shape {tuple(params.shape)}: the grid expects [{spec.n_params}]")
    if x.dtype != params.dtype or x.device != params.device:
        raise ValueError(
            f"points are {x.dtype} on {x.device}, params {params.dtype} on {params.device}; move one of them"
        )
    return OPERATION.select(backend, x, spec).forward(x, params, spec)


def _sample(module: ModuleType, device: torch.device, spec: HashGridSpec) -> tuple[Tensor, ...]:
    """Features and gradients at some points, a few of them outside the unit cube."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(512, spec.n_input_dims, generator=generator) * 1.2 - 0.1).to(device).requires_grad_()
    params = torch.randn(spec.n_params, generator=generator).to(device).requires_grad_()
    weights = torch.randn(512, spec.n_output_dims, generator=generator).to(device)
    features = module.forward(x, params, spec)
    return features.detach(), *torch.autograd.grad(features, (x, params), weights)


OPERATION = Operation(
    name="hash grid",
    package=__name__,
    modules={"torch": ".reference", "numba": ".numba_cpu", "triton": ".triton_gpu"},
    fastest={"cpu": "numba", "cuda": "triton"},
    sample=_sample,
    unrepeatable=("triton",),
)
