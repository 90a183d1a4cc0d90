"""Texts for models that are also told one vector for the whole of a text: its last row, filled up with zeros.

So a text stays one matrix in the cache, in mixtures of views and in all distillations.

T texts, L tokens, C channels, P channels of the vector, W the larger one of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def with_pooled(states: Float[Tensor, "T L C"], pooled: Float[Tensor, "T P"]) -> Float[Tensor, "T M W"]:
    """The texts' tokens, and the vectors for the whole of them."""
    width = max(states.shape[-1], pooled.shape[-1])
    rows = (F.pad(part, (0, width - part.shape[-1])) for part in (states, pooled[:, None]))
    return torch.cat([*rows], dim=1)


def split_pooled(
    texts: Float[Tensor, "T M W"], channels: int, pooled_channels: int, processor: str
) -> tuple[Float[Tensor, "T L C"], Float[Tensor, "T P"]]:
    """What ``with_pooled`` was given.

    Args:
        processor: the prompt processor that makes such texts, for the message.

    Raises:
        ValueError: the texts come from another one.
    """
    if texts.shape[-1] != max(channels, pooled_channels):
        raise ValueError(
            f"prompt_processor_type: the prior reads texts of {max(channels, pooled_channels)} channels, and "
            f"got {texts.shape[-1]}; set it to {processor}"
        )
    return texts[:, :-1, :channels], texts[:, -1, :pooled_channels]
