"""The sums and norms in torch. B images, C channels, H x W pixels."""

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
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """See ``add_norm`` of the package."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + bias[:, None, None]
    if residual is not None:
        total = total + residual
    normed = F.group_norm(total, groups, scale.to(wide), shift.to(wide), eps)
    normed = F.silu(normed) if silu else normed
    return normed.to(x.dtype), total.to(x.dtype)


def bias_norm(
    x: Float[Tensor, "B C H W"],
    bias: Float[Tensor, "C"],
    scale: Float[Tensor, "C"],
    shift: Float[Tensor, "C"],
    groups: int,
    eps: float,
) -> Float[Tensor, "B C H W"]:
    """See ``bias_norm`` of the package."""
    return add_norm(x, bias, None, scale, shift, groups, eps, True)[0]


def add(
    x: Float[Tensor, "B C H W"], bias: Float[Tensor, "C"], residual: Float[Tensor, "B C H W"] | None
) -> Float[Tensor, "B C H W"]:
    """See ``add`` of the package."""
    total = x.to(torch.promote_types(x.dtype, torch.float32)) + bias[:, None, None]
    return (total if residual is None else total + residual).to(x.dtype)
