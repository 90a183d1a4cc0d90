"""Piece by piece gives what one graph gives, and nothing is kept or lost on the way."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourdfy.ops.recomputation import recomputed
from fourdfy.types import TensorRecord


@dataclass(frozen=True, kw_only=True)
class Pair(TensorRecord):
    product: Tensor
    constant: Tensor
    missing: Tensor | None = None


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def compute_from(inputs, calls=None):
    def compute(piece):
        if calls is not None:
            calls.append((piece, torch.is_grad_enabled()))
        a, b, _ = inputs
        return Pair(product=(a * piece).exp() * b, constant=torch.full((2,), float(piece)))

    return compute


def loss_of(records):
    return sum((k + 1) * record.product.square().sum() for k, record in enumerate(records))


def test_values_and_gradients_are_those_of_one_graph(inputs):
    compute, pieces = compute_from(inputs), [0.1, 0.5, -0.3]
    plain = [compute(piece) for piece in pieces]
    library = [checkpoint(compute, piece, use_reentrant=False) for piece in pieces]
    ours = recomputed(compute, pieces, inputs)
    assert all(torch.equal(x.product, y.product) for x, y in zip(ours, plain, strict=True))
    assert all(record.missing is None for record in ours)
    expected, theirs, actual = (
        torch.autograd.grad(loss_of(records), inputs, allow_unused=True) for records in (plain, library, ours)
    )
    assert actual[2] is None and expected[2] is None
    torch.testing.assert_close(actual[:2], expected[:2])
    torch.testing.assert_close(actual[:2], theirs[:2])


def test_every_piece_is_computed_once_without_and_once_with_a_graph(inputs):
    calls = []
    records = recomputed(compute_from(inputs, calls), [1.0, 2.0], inputs)
    assert calls == [(1.0, False), (2.0, False)]
    loss_of(records).backward()
    assert calls[2:] == [(1.0, True), (2.0, True)]


def test_a_result_that_no_loss_reads_costs_no_gradient(inputs):
    first, _ = recomputed(compute_from(inputs), [1.0, 2.0], inputs)
    first.product.sum().backward()
    a, b, _ = inputs
    torch.testing.assert_close(b.grad, a.exp())


def test_what_was_frozen_in_the_forward_pass_learns_nothing(inputs):
    inputs[0].requires_grad_(False)
    records = recomputed(compute_from(inputs), [1.0], inputs)
    inputs[0].requires_grad_(True)
    loss_of(records).backward()
    assert inputs[0].grad is None and inputs[1].grad is not None


def test_what_is_frozen_since_does_not_stop_the_others(inputs):
    records = recomputed(compute_from(inputs), [1.0], inputs)
    inputs[1].requires_grad_(False)
    loss_of(records).backward()
    assert inputs[0].grad is not None and inputs[1].grad is None
    assert [tensor.requires_grad for tensor in inputs] == [True, False, True]


def test_frozen_inputs_alone_need_no_backward_pass(inputs):
    for tensor in inputs:
        tensor.requires_grad_(False)
    (record,) = recomputed(compute_from(inputs), [1.0], inputs)
    assert not record.product.requires_grad


def test_an_input_that_changed_is_an_error(inputs):
    records = recomputed(compute_from(inputs), [1.0], inputs)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(records).backward()


def test_gradients_of_gradients_are_an_error(inputs):
    records = recomputed(compute_from(inputs), [1.0], inputs)
    (slope,) = torch.autograd.grad(loss_of(records), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
