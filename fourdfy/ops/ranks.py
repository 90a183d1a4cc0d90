"""One step over several processes (ranks), each of which computes a share of whatever is independent.

Every rank runs the same step with the same random draws. What is spread is gathered with its graph, so that
losses are computed alike everywhere. Each rank differentiates its Nth part of the loss, gathers add up the
gradients of all ranks, and those of the parameters are summed once, whether they come from a share or from
what every rank computes. In one process everything here is the identity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 1 << 20
"""Numbers up to which the gradients of parameters are summed together, to save calls."""


class RankError(RuntimeError):
    """The ranks have lost each other."""


@dataclass(frozen=True)
class Ranks:
    """The processes that compute a step together."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files, logs and shows progress."""
        return self.rank == 0

    def share(self, length: int, group: int = 1) -> slice:
        """Which of ``length`` things in a row this rank computes; neighbours in a ``group`` stay together."""
        groups = length // group
        first, last = (groups * rank // self.count * group for rank in (self.rank, self.rank + 1))
        return slice(first, last)


ALONE = Ranks()
_ranks: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def ranks() -> Ranks:
    """Those that compute a step together with this process."""
    return _ranks.get()


@contextmanager
def together(those: Ranks) -> Iterator[None]:
    """Compute steps together with the other processes of torch's default group."""
    token = _ranks.set(those)
    try:
        yield
    finally:
        _ranks.reset(token)


def spread(function: Callable[..., Any], *rows: Tensor | None, group: int = 1) -> Any:
    """``function(*rows)``, each rank computing its share of the rows.

    A rank without a share computes the first group for nothing: nobody waits longer for it, and networks
    whose weights are spread over the ranks are called everywhere.

    Args:
        function: gives a tensor or a tuple of tensors, with as many rows.
        group: neighbours that depend on each other.
    """
    us = ranks()
    if us.count == 1:
        return function(*rows)
    length = next(len(row) for row in rows if row is not None)
    mine = us.share(length, group)
    is_idle = mine.start == mine.stop
    part = slice(group) if is_idle else mine
    results = function(*(row if row is None else row[part] for row in rows))
    several = isinstance(results, tuple)
    shares = [result[:0] if is_idle else result for result in (results if several else (results,))]
    whole = gathered(shares, mine.start, length)
    return tuple(whole) if several else whole[0]


def gathered(shares: Sequence[Tensor], start: int, length: int) -> list[Tensor]:
    """Tensors whose ``length`` rows are those of all ranks in order, with their graphs.

    Args:
        shares: this rank's rows, from row ``start`` on.
    """
    return list(_Gathered.apply(start, length, *shares)) if ranks().count > 1 else [*shares]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, start, length, *shares):
        ctx.set_materialize_grads(False)
        ctx.rows = [slice(start, start + len(share)) for share in shares]
        # Zeros summed with rows: unlike gathers, every back end sums shares of different lengths.
        wholes = [share.new_zeros(length, *share.shape[1:]) for share in shares]
        for whole, share, rows in zip(wholes, shares, ctx.rows, strict=True):
            whole[rows] = share
            _summed(whole)
        ctx.mark_non_differentiable(
            *(whole for whole, learns in zip(wholes, ctx.needs_input_grad[2:], strict=True) if not learns)
        )
        return tuple(wholes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        # Losses are the same on all ranks, and so is which of the gradients there are.
        return (
            None,
            None,
            *(
                None if grad is None else _summed(grad.clone(memory_format=torch.contiguous_format))[rows]
                for grad, rows in zip(grads, ctx.rows, strict=True)
            ),
        )


def offset(length: int) -> tuple[int, int]:
    """(where this rank's ``length`` rows start, how many all ranks have), if no rank knows the others'."""
    lengths = largest([length if rank == ranks().rank else 0 for rank in range(ranks().count)])
    return sum(lengths[: ranks().rank]), sum(lengths)


def largest(numbers: Sequence[int]) -> list[int]:
    """The largest of all ranks, number by number; hosts wait for each other, but not for their GPUs."""
    return _reduced(torch.tensor(numbers), dist.ReduceOp.MAX).tolist() if ranks().count > 1 else [*numbers]


def of_first_rank(value: Any) -> Any:
    """A tensor, or an object that can be pickled, as the first rank has it."""
    if ranks().count == 1:
        return value
    with _lost_ranks():
        if isinstance(value, Tensor):
            whole = value.detach().contiguous()
            dist.broadcast(whole, 0)
            return value if whole.data_ptr() == value.data_ptr() else value.copy_(whole)
        told = [value]
        dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
        return told[0]


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of all ranks by their sums; a parameter has none where no rank has one."""
    if ranks().count == 1:
        return
    parameters = [*parameters]
    some = largest([parameter.grad is not None for parameter in parameters])
    small: dict[torch.dtype, list[Tensor]] = {}
    for parameter in (parameter for parameter, has in zip(parameters, some, strict=True) if has):
        grad = parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if grad.numel() > SMALL and grad.is_contiguous():
            _summed(grad)
        else:
            small.setdefault(grad.dtype, []).append(grad)
    for grads in small.values():
        row = _summed(torch.cat([grad.flatten() for grad in grads]))
        for grad, sums in zip(grads, row.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(sums.view_as(grad))


def _summed(tensor: Tensor) -> Tensor:
    """The tensor itself, which then has the sums over all ranks."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def _reduced(tensor: Tensor, how: Any) -> Tensor:
    with _lost_ranks():
        dist.all_reduce(tensor, how)
    return tensor


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
        raise RankError(
            f"rank {ranks().rank}: another rank has ended, or has not answered for "
            f"trainer.rank_timeout_minutes: {reason}"
        ) from error
