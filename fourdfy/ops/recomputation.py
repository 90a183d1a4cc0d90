"""Gradients in bounded memory: piece by piece, each recomputed in the backward pass (Chen et al. 2016).

``torch.utils.checkpoint`` does the same, but also builds every piece's graph in the forward pass and tracks
each tensor that it would save. Small pieces, which are bound by launches, take half of the time here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fourdfy.types import TensorRecord

Piece = TypeVar("Piece")
Record = TypeVar("Record", bound=TensorRecord)


def recomputed(
    compute: Callable[[Piece], Record], pieces: Sequence[Piece], inputs: Sequence[Tensor]
) -> list[Record]:
    """``compute(piece)`` of every piece; only one of their graphs exists at a time, in the backward pass.

    The recomputation has the autocast state of the first, and its inputs require gradients again. Everything
    else that ``compute`` reads must be unchanged: randomness must come from a generator that it copies.

    Args:
        inputs: the tensors that ``compute`` derives its results from. Gradients reach those that require
            one now, and no other tensor.

    Raises:
        RuntimeError: in the backward pass, an input was modified in place, or gradients of gradients are
            asked for.
    """
    with torch.no_grad():
        records = [compute(piece) for piece in pieces]
    learning = [tensor for tensor in inputs if tensor.requires_grad]
    values = tuple(value for record in records for value in record.tensors().values())
    with_graph = iter(_Recomputed.apply(compute, pieces, values, *learning))
    return [record.mapped(lambda _: next(with_graph)) for record in records]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, pieces, values, *inputs):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.compute, ctx.pieces = compute, pieces
        device = values[0].device.type
        ctx.autocast = partial(
            torch.autocast,
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        inputs, arriving = ctx.saved_tensors, iter(grads)
        totals: list[Tensor | None] = [None] * len(inputs)
        with _requiring_gradients(inputs):
            for piece in ctx.pieces:
                with torch.enable_grad(), ctx.autocast():
                    values = ctx.compute(piece).tensors().values()
                # As many gradients as there are values; the rest is for the pieces to come.
                pairs = [(value, next(arriving)) for value in values]
                pairs = [(value, grad) for value, grad in pairs if grad is not None and value.requires_grad]
                if not pairs:
                    continue
                outputs, upstream = zip(*pairs, strict=True)
                for k, grad in enumerate(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)):
                    if grad is not None:
                        total = totals[k]
                        totals[k] = grad.clone() if total is None else total.add_(grad)
        return None, None, None, *totals


@contextmanager
def _requiring_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Some may have been frozen since."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
