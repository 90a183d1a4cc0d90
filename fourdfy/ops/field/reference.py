"""The space-time field in plain torch: the definition that every other back end must agree with."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.hash_grid import reference as hash_grid
from fourdfy.ops.hash_grid.spec import HashGridSpec, over_time
from fourdfy.ops.mlp import reference as mlp


def forward(
    x: Float[Tensor, "N 3"],
    times: Float[Tensor, "N"],
    space: Float[Tensor, "P"],
    space_time: Float[Tensor, "Q"],
    spec: HashGridSpec,
    hidden: Float[Tensor, "H C"],
    output: Float[Tensor, "K H"],
    slices: bool | None = None,
) -> Float[Tensor, "N K"]:
    """See ``field``. ``slices`` is a way to compute the same, which a fast back end may have."""
    here_and_now = torch.cat([x, times[:, None]], dim=1)
    features = hash_grid.forward(x, space, spec)
    features = features + hash_grid.forward(here_and_now, space_time, over_time(spec))
    return mlp.forward(features, hidden, output)
