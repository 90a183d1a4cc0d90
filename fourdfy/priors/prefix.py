"""What a U-Net computes before it reads the text, computed once for all guidance branches.

The branches of classifier-free guidance are neighbours in one batch, and differ in their texts alone. Until
the first cross-attention they are equal. On a CPU, which is busy from the first image on, the layers in front
of it are given the first branch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def compute_prefix_once(unet: Any) -> None:
    """Have the layers before a diffusers U-Net's first cross-attention compute equal halves of a batch once.

    Works in place, where no graph is made. Results differ by rounding alone, whatever the batch is.
    """
    layers: list[Any] = [unet.transformer_in] if hasattr(unet, "transformer_in") else []
    for block in getattr(unet, "down_blocks", [])[:1]:
        layers += [block.resnets[0], *getattr(block, "temp_convs", [])[:1]]
        layers += [
            attention.transformer_blocks[0].attn1 for attention in getattr(block, "attentions", [])[:1]
        ]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: nn.Module, forward: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    given = (*args, *keywords.values())
    # Images of a clip, or views of an object, that the layer does not look at one by one.
    group = keywords.get("num_frames", getattr(getattr(layer, "processor", None), "num_views", 1))
    if torch.is_grad_enabled() or not all(_repeats_itself(x, group) for x in given if isinstance(x, Tensor)):
        return forward(*args, **keywords)
    once = forward(*map(_half, args), **{key: _half(value) for key, value in keywords.items()})
    return tuple(torch.cat([x, x]) for x in once) if isinstance(once, tuple) else torch.cat([once, once])


def _repeats_itself(x: Tensor, group: int) -> bool:
    half, odd = divmod(len(x), 2)
    return not odd and half % group == 0 and torch.equal(x[:half], x[half:])


def _half(value: Any) -> Any:
    return value[: len(value) // 2] if isinstance(value, Tensor) else value
