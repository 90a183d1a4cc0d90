"""The one place that looks for NaN and infinity, before the optimizer or a checkpoint spreads them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def check_step(
    losses: Mapping[str, Tensor], groups: Collection[Mapping[str, Any]], system: nn.Module, where: str
) -> None:
    """Refuse a step with a loss or a gradient that is not finite.

    One tensor holds every loss and every group's largest gradient, so that the device is read once. A prior
    that fails needs no look of its own: its prediction is in its loss.

    Args:
        losses: scalars by name.
        groups: the optimizer's; without any, the losses alone are looked at.
        where: the step, for the message.

    Raises:
        FloatingPointError: says where, what, and which parameters are not finite already.
    """
    gradients = {
        f"the gradient of {group['name']}": nn.utils.get_total_norm(
            [p.grad for p in group["params"] if p.grad is not None], math.inf
        )
        for group in groups
    }
    values = {f"the loss {name}": loss for name, loss in losses.items()} | gradients
    read = torch.stack([value.detach().float() for value in values.values()]).tolist()
    wrong = [f"{name} is {x}" for name, x in zip(values, read, strict=True) if not math.isfinite(x)]
    if not wrong:
        return
    wrong = [text for text in wrong if text.startswith("the loss")] or wrong  # gradients follow the losses
    broken = not_finite(dict(system.named_parameters()))
    hint = f"; {broken[0]} was not finite before it (is its learning rate too high?)" if broken else ""
    raise FloatingPointError(f"{where}: {', '.join(wrong)}{hint}; stopped before the optimizer's step")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
