"""``attention`` by PyTorch's own kernels."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def forward(
    q: Float[Tensor, "B T C"], k: Float[Tensor, "B T C"], v: Float[Tensor, "B T C"]
) -> Float[Tensor, "B T C"]:
    """See ``attention``."""
    return F.scaled_dot_product_attention(q, k, v)
