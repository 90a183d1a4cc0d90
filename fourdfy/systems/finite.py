"""The check for NaN and infinity, before the optimizer or a checkpoint spreads them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fourdfy.ops.finite import largest_entries
from fourdfy.ops.ranks import of_first_rank
from fourdfy.ops.reading import Reading

logger = logging.getLogger(__name__)

LEARNING_RATE = " (is its learning rate too high?)"

OVERFLOWS = 40
"""Steps in a row whose gradients a scaler may find not finite: enough to halve its scale to 1e-7. If they
still aren't, they don't overflow."""


class FiniteCheck:
    """Keeps ``optimizer`` from acting on a step with a parameter, a loss or a gradient that is not finite.

    An optimizer with fused kernels on a GPU skips such a step there, by what gradient scalers use: the host
    does not wait for the numbers, and ``settle`` raises later. With others, the check itself raises.

    Args:
        allowed: so many such steps cost a warning each; one more raises (``trainer.max_skipped_steps``).
        keep: called with each of them; gives what to type for a closer look, for the message.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        allowed: int = 0,
        keep: Callable[[StepNumbers], str] = lambda numbers: "",
    ) -> None:
        self.optimizer, self.groups = optimizer, optimizer.param_groups
        self.allowed, self.keep = allowed, keep
        self.skipped = 0
        """Broken steps so far; a checkpoint holds it."""
        self._overflows = 0
        self._step: StepNumbers | None = None
        self.reads_late = skips_on_gpu(optimizer)
        if self.reads_late:
            optimizer.register_step_pre_hook(self._tell)

    def __call__(self, losses: Mapping[str, Tensor], step: object, *, scaled: bool = False) -> bool:
        """Check a step, after the one before; False if it is known to be broken, and has no gradients now.

        Args:
            losses: scalars by name.
            step: its ``str`` opens the message.
            scaled: a gradient scaler handles gradients that overflow by skipping their step.

        Raises:
            FloatingPointError: says where and what.
        """
        self.settle()
        self._step = StepNumbers(losses, self.groups, step, scaled=scaled)
        if self.reads_late:
            self.optimizer.found_inf = self._step.is_broken  # type: ignore[attr-defined]
            return True
        if fine := self.settle():
            return fine
        self.optimizer.zero_grad()  # optimizers leave parameters without a gradient alone
        return False

    def settle(self) -> bool:
        """Whether the last step was not broken: asked before the next one, and before anything is saved or
        shown.

        Raises:
            FloatingPointError: it was, and no more such steps are allowed.
        """
        numbers, self._step = self._step, None
        if numbers is None:
            return True
        self._overflows = self._overflows + 1 if numbers.overflows else 0
        problem = numbers.problem(gradients=not numbers.scaled or self._overflows > OVERFLOWS)
        if not problem:
            return True
        self.skipped += 1
        where, look = f"{numbers.step}: {problem}", self.keep(numbers)
        if self.skipped > self.allowed:
            raise FloatingPointError(f"{where}; stopped before the optimizer's step{look}")
        allowed = f"{self.skipped} of {self.allowed} allowed by trainer.max_skipped_steps"
        logger.warning("%s; skipped (%s)%s", where, allowed, look)
        return False

    def _tell(self, optimizer: Any, *_: Any) -> None:
        """Tell the kernels again: a gradient scaler has just told them what it found instead."""
        if self._step is not None and self._step.scaled:
            optimizer.found_inf = torch.maximum(optimizer.found_inf, self._step.is_broken)


def skips_on_gpu(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernels leave everything as it is where ``optimizer.found_inf`` is 1."""
    return is_fused(optimizer) and all(
        parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"]
    )


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether gradient scalers leave unscaling and skipping to its kernels."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


class StepNumbers:
    """The losses of a step and the largest entry of every parameter and gradient, in one tensor.

    A prior that fails needs no separate check, as its prediction enters its loss. Parameters do: a density
    of NaN is pruned like empty space, which no loss shows.
    """

    def __init__(
        self,
        losses: Mapping[str, Tensor],
        groups: Collection[Mapping[str, Any]],
        step: object,
        *,
        scaled: bool = False,
    ) -> None:
        self.step, self.scaled, self.num_losses = step, scaled, len(losses)
        pairs = [(group["name"], p) for group in groups for p in group["params"]]
        gradients = [*_filled((f"the gradient of {name}", p.grad) for name, p in pairs)]
        sized = [*_filled((f"a parameter of {name}", p.detach()) for name, p in pairs), *gradients]
        self.names = [*(f"the loss {name}" for name in losses), *(name for name, _ in sized)]
        values = [torch.stack([loss.detach().float() for loss in losses.values()])] if losses else []
        values += [largest_entries([tensor for _, tensor in sized])] if sized else []
        numbers = of_first_rank(torch.cat(values))  # so that all ranks judge alike
        judged = numbers[: len(numbers) - len(gradients)] if scaled else numbers
        self.is_broken = (~judged.isfinite()).any().float()
        self._reading = Reading(numbers)

    @property
    def losses(self) -> dict[str, float]:
        """The losses by name; waits for the device."""
        numbers = zip(self.names[: self.num_losses], self._reading.numbers(), strict=False)
        return {name.removeprefix("the loss "): number for name, number in numbers}

    @cached_property
    def wrong(self) -> dict[str, float]:
        """What is not finite: NaN if one of its numbers is; waits for the device."""
        found: dict[str, float] = {}
        for name, number in zip(self.names, self._reading.numbers(), strict=True):
            if not math.isfinite(number):
                found[name] = number + found.get(name, 0.0)
        return found

    @property
    def overflows(self) -> bool:
        """Whether a gradient is not finite where a scaler is in charge."""
        return self.scaled and any(name.startswith("the gradient") for name in self.wrong)

    def problem(self, *, gradients: bool) -> str:
        """What is not finite, causes without their consequences; "" if nothing is.

        Args:
            gradients: whether they count.
        """
        wrong = [f"{name} is {number}" for name, number in self.wrong.items()]
        for kind in ("a parameter of", "the loss", *(["the gradient of"] if gradients else [])):
            if found := [text for text in wrong if text.startswith(kind)]:
                return ", ".join(found) + (LEARNING_RATE if kind == "a parameter of" else "")
        return ""


def _filled(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """Those that have entries; some layers have empty parameters."""
    return ((name, tensor) for name, tensor in tensors if tensor is not None and tensor.numel())
