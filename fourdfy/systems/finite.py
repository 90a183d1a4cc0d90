"""The check for NaN and infinity, before the optimizer or a checkpoint spreads them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_step(
    losses: Mapping[str, Tensor], groups: Collection[Mapping[str, Any]], where: str, *, scaled: bool = False
) -> None:
    """Refuse a step with a parameter, a loss or a gradient that is not finite.

    One tensor holds every loss and the largest entries of every group's parameters and gradients, so that
    the device is read once. A prior that fails needs no separate check, as its prediction enters its loss.
    Parameters do: a density of NaN is pruned like empty space, which no loss shows.

    Args:
        losses: scalars by name.
        groups: the optimizer's.
        where: the step, for the message.
        scaled: a gradient scaler handles gradients that overflow by skipping their step.

    Raises:
        FloatingPointError: says where and what.
    """
    kinds = (
        {f"a parameter of {group['name']}": _largest(group["params"]) for group in groups},
        {f"the loss {name}": loss.detach().float() for name, loss in losses.items()},
        {} if scaled else {f"the gradient of {g['name']}": _largest(_gradients(g["params"])) for g in groups},
    )
    device = next(iter(losses.values())).device
    values = [value.to(device) for kind in kinds for value in kind.values()]
    numbers = iter(torch.stack(values).tolist())
    read = [dict(zip(kind, numbers, strict=False)) for kind in kinds]
    for kind in read:  # causes before their consequences
        if wrong := [f"{name} is {x}" for name, x in kind.items() if not math.isfinite(x)]:
            hint = " (is its learning rate too high?)" if kind is read[0] else ""
            raise FloatingPointError(
                f"{where}: {', '.join(wrong)}{hint}; stopped before the optimizer's step"
            )


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value; 0 where there is none."""
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]  # some layers have empty ones
    return nn.utils.get_total_norm(filled, math.inf).float()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
