"""The check for NaN and infinity, before the optimizer or a checkpoint spreads them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fourdfy.ops.reading import Reading

LEARNING_RATE = " (is its learning rate too high?)"


class FiniteCheck:
    """Refuses steps with a parameter, a loss or a gradient that is not finite, before ``optimizer`` acts.

    An optimizer with fused kernels on a GPU skips such a step there, by what gradient scalers use: the host
    does not wait for the numbers, and ``settle`` raises later. With others, the check itself raises.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.groups = optimizer, optimizer.param_groups
        self._step: StepNumbers | None = None
        self._scaled = False
        self._skips = skips_on_gpu(optimizer)
        if self._skips:
            optimizer.register_step_pre_hook(self._tell)

    def __call__(self, losses: Mapping[str, Tensor], where: str, *, scaled: bool = False) -> None:
        """Check a step, after the one before; the arguments are those of ``check_step``."""
        self.settle()
        self._step = StepNumbers(losses, self.groups, where, scaled=scaled)
        self._scaled = scaled
        if self._skips:
            self.optimizer.found_inf = self._step.is_broken  # type: ignore[attr-defined]
        else:
            self.settle()

    def settle(self) -> None:
        """Raise for a step that was skipped: before the next one, and before anything is saved or shown.

        Raises:
            FloatingPointError: see ``check_step``.
        """
        step, self._step = self._step, None
        if step is not None:
            step.refuse_broken()

    def _tell(self, optimizer: Any, *_: Any) -> None:
        """Tell the kernels again: a gradient scaler has just told them what it found instead."""
        if self._scaled and self._step is not None:
            optimizer.found_inf = torch.maximum(optimizer.found_inf, self._step.is_broken)


def skips_on_gpu(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernels leave everything as it is where ``optimizer.found_inf`` is 1."""
    return is_fused(optimizer) and all(
        parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"]
    )


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether gradient scalers leave unscaling and skipping to its kernels."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def check_step(
    losses: Mapping[str, Tensor], groups: Collection[Mapping[str, Any]], where: str, *, scaled: bool = False
) -> None:
    """Refuse a step with a parameter, a loss or a gradient that is not finite.

    A prior that fails needs no separate check, as its prediction enters its loss. Parameters do: a density
    of NaN is pruned like empty space, which no loss shows.

    Args:
        losses: scalars by name.
        groups: the optimizer's.
        where: the step, for the message.
        scaled: a gradient scaler handles gradients that overflow by skipping their step.

    Raises:
        FloatingPointError: says where and what.
    """
    StepNumbers(losses, groups, where, scaled=scaled).refuse_broken()


class StepNumbers:
    """The losses of a step and the largest entry of every parameter and gradient, in one tensor."""

    def __init__(
        self, losses: Mapping[str, Tensor], groups: Collection[Mapping[str, Any]], where: str, *, scaled: bool
    ) -> None:
        self.where = where
        parameters = [(f"a parameter of {g['name']}", p.detach()) for g in groups for p in g["params"]]
        gradients = [(f"the gradient of {g['name']}", p.grad) for g in groups for p in g["params"]]
        largest = [*_filled(parameters), *([] if scaled else _filled(gradients))]
        sizes = torch._foreach_norm([tensor for _, tensor in largest], math.inf) if largest else ()
        self.names = [*(f"the loss {name}" for name in losses), *(name for name, _ in largest)]
        values = torch.stack([value.detach().float() for value in (*losses.values(), *sizes)])
        self.is_broken = (~values.isfinite()).any().float()
        self._reading = Reading(values)

    def refuse_broken(self) -> None:
        wrong: dict[str, float] = {}
        for name, number in zip(self.names, self._reading.numbers(), strict=True):
            if not math.isfinite(number):
                wrong[name] = number + wrong.get(name, 0.0)  # NaN if one of them is
        for kind in ("a parameter of", "the loss", "the gradient of"):  # causes before their consequences
            if found := [f"{name} is {number}" for name, number in wrong.items() if name.startswith(kind)]:
                hint = LEARNING_RATE if kind == "a parameter of" else ""
                raise FloatingPointError(
                    f"{self.where}: {', '.join(found)}{hint}; stopped before the optimizer's step"
                )


def _filled(tensors: Collection[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """Those that have entries; some layers have empty parameters."""
    return ((name, tensor) for name, tensor in tensors if tensor is not None and tensor.numel())


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
