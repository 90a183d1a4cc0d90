"""``add_norm`` and ``add`` in torch. B images, C channels, H x W pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def add_norm(
    x: Float[Tensor, "B C H W"],
    bias: Float[Tensor, "C"],
    residual: Float[Tensor, "B C H W"] | None,
    scale: Float[Tensor, "C"],
    shift: Float[Tensor, "C"],
    groups: int,
    eps: float,
    silu: bool,
    keep_sum: bool,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"] | None]:
    """See ``add_norm``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = _sum(x.to(wide), bias, residual)
    normed = F.group_norm(total, groups, scale.to(wide), shift.to(wide), eps)
    normed = F.silu(normed) if silu else normed
    return normed.to(x.dtype), total.to(x.dtype) if keep_sum else None


def add(
    x: Float[Tensor, "B C H W"], bias: Float[Tensor, "C"], residual: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C H W"]:
    """See ``add``."""
    return _sum(x.to(torch.promote_types(x.dtype, torch.float32)), bias, residual).to(x.dtype)


def _sum(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    total = x + bias[:, None, None]
    return total if residual is None else total + residual
