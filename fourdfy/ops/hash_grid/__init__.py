"""Multiresolution hash grid (Mueller et al. 2022): one definition, three back ends.

N points, D dimensions of a point, K features of a point, P parameters over all levels (``spec``).
"""

from __future__ import annotations

import logging
import os
import shutil
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.hash_grid.spec import HashGridSpec

logger = logging.getLogger(__name__)

BACKENDS = {"torch": ".reference", "numba": ".numba_cpu", "triton": ".triton_gpu"}
"""Name -> module with ``forward(x, params, spec)``; imported on first use."""

FASTEST = {"cpu": "numba", "cuda": "triton"}
"""Device -> its fast back end for float32; both need the package of the same name."""


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
    if backend == "auto":
        backend = pick_backend(x)
        if backend == "triton" and not agrees_with_reference(backend, spec, x.device):
            backend = "torch"
        _log_once(backend, x.device.type, str(x.dtype))
    return _load_backend(backend).forward(x, params, spec)


def pick_backend(x: Tensor) -> str:
    """The fastest back end that is installed and serves the device and dtype of ``x``."""
    name = FASTEST.get(x.device.type)
    repeatable = name != "triton" or not torch.are_deterministic_algorithms_enabled()
    if name is None or x.dtype != torch.float32 or not repeatable or not _is_installed(name):
        name = "torch"
    return name


@cache
def agrees_with_reference(name: str, spec: HashGridSpec, device: torch.device) -> bool:
    """Whether a back end gives the reference's features and gradients at some points, on this device.

    Triton's kernels are compiled on the spot by the version that is installed, so ``auto`` checks
    them first. A warning says if they fail or differ.
    """
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(512, spec.n_input_dims, generator=generator) * 1.2 - 0.1).to(device)
    params = torch.randn(spec.n_params, generator=generator).to(device)
    weights = torch.randn(512, spec.n_output_dims, generator=generator).to(device)

    def results(backend: str) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = x.clone().requires_grad_(), params.clone().requires_grad_()
            features = _load_backend(backend).forward(*inputs, spec)
            return features.detach(), *torch.autograd.grad(features, inputs, weights)

    try:
        # Means are compared, because rounding may put a point at a cell's border on either side of it.
        errors = [
            float((ours - theirs).abs().mean() / theirs.abs().mean())
            for ours, theirs in zip(results(name), results("torch"), strict=True)
        ]
    except Exception as error:  # anything that a compiler or a driver raises
        trouble = f"{type(error).__name__}: {error}"
    else:
        if all(error < 1e-3 for error in errors):
            return True
        trouble = f"its relative errors are {', '.join(f'{error:.1e}' for error in errors)}"
    logger.warning(
        "the %s back end of the hash grid does not work here (%s); the slow one is used", name, trouble
    )
    return False


def check_backend(name: str) -> None:
    """Raise a ValueError unless ``name`` is ``auto`` or a back end."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"hash grid back end {name!r}: expected auto, {', '.join(BACKENDS)}")


@cache
def _load_backend(name: str):
    check_backend(name)
    try:
        return import_module(BACKENDS[name], __name__)
    except ImportError as error:
        raise ValueError(
            f"the {name} back end of the hash grid needs {error.name}: "
            f"pip install {error.name}, or use backend=auto"
        ) from error


@cache
def _is_installed(package: str) -> bool:
    if package == "triton" and not _has_c_compiler():
        logger.warning(
            "no C compiler, which Triton starts its kernels with: the hash grid will be slow; install gcc"
        )
        return False
    if find_spec(package) is None:
        logger.warning("%s is not installed: the hash grid will be slow; pip install %s", package, package)
        return False
    return True


def _has_c_compiler() -> bool:
    return bool(os.environ.get("CC")) or any(shutil.which(name) for name in ("gcc", "clang", "cc"))


@cache
def _log_once(name: str, device: str, dtype: str) -> None:
    logger.debug("hash grid: %s back end for %s on %s", name, dtype, device)
