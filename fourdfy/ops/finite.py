"""Numbers that are not finite, found with one look at the device for many tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def largest_entries(tensors: list[Tensor]) -> Float[Tensor, "N"]:
    """The largest absolute entry of each, in float32: NaN or infinite if one of its entries is.

    Args:
        tensors: of floats, on one device, each with at least one entry.
    """
    return torch.stack([size.float() for size in torch._foreach_norm(tensors, math.inf)])


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity; all are on one device."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return []
    found = largest_entries(list(floats.values())).isfinite().tolist()
    return [name for name, finite in zip(floats, found, strict=True) if not finite]
