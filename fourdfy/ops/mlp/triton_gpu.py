"""The small network on CUDA, as Triton kernels; float32.

N points, C inputs, H hidden neurons in chunks of HC, K outputs, B points of a block. Triton's tiles have
powers of two as sizes, so inputs and outputs are padded: CP, KP. The inputs of a point stand together,
[1, N, C], or in L groups of F, as the levels of a hash grid do: [L, N, F].

The hidden activations stay in registers, and the backward pass computes them again. A product of float32
matrices is made of three in TF32 (of the leading bits, and of these with the rest) or six in bfloat16,
whichever is faster; the sum is as accurate as float32. No addition is atomic: all results are reproducible.
"""

from __future__ import annotations

from functools import cache
from typing import no_type_check

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton import language as tl

from fourdfy.ops.mlp import reference

BLOCK = 64
CHUNK = 64


def forward(
    x: Float[Tensor, "N C"], hidden: Float[Tensor, "H C"], output: Float[Tensor, "K H"]
) -> Float[Tensor, "N K"]:
    """See ``mlp``. Runs on the CPU under ``TRITON_INTERPRET=1``, which is for tests.

    Raises:
        ValueError: not float32 on CUDA.
    """
    if x.dtype != torch.float32 or not (x.is_cuda or _is_interpreted()):
        raise ValueError(
            f"the triton back end computes float32 on CUDA, not {x.dtype} on {x.device}; use backend=auto"
        )
    return _MLP.apply(x.contiguous(), hidden.contiguous(), output.contiguous())


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, output):
        ctx.save_for_backward(x, hidden, output)
        return outputs_of(x[None], hidden, output)

    @staticmethod
    def backward(ctx, grad_outputs):
        x, hidden, output = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*reference.gradients((x, hidden, output), grad_outputs, ctx.needs_input_grad),)
        grad_outputs = grad_outputs.contiguous()
        wants_x, *wants_weights = ctx.needs_input_grad
        given = x[None], hidden, output, grad_outputs
        grads = weight_gradients(*given) if any(wants_weights) else (None, None)
        return input_gradient(*given)[0] if wants_x else None, *grads


def outputs_of(x: Float[Tensor, "L N F"], hidden: Tensor, output: Tensor) -> Float[Tensor, "N K"]:
    """``forward`` without a graph, of contiguous tensors."""
    outputs = x.new_empty(x.shape[1], len(output))
    _launch(_evaluate, "tf32x3", triton.cdiv(x.shape[1], BLOCK), 1, x, hidden, output, outputs)
    return outputs


def input_gradient(
    x: Float[Tensor, "L N F"],
    hidden: Tensor,
    output: Tensor,
    grad_outputs: Tensor,
    into: Tensor | None = None,
) -> Float[Tensor, "L N F"]:
    """The gradient of ``x``, written to ``into``, which may be ``x`` itself."""
    into = torch.empty_like(x) if into is None else into
    n_programs = triton.cdiv(x.shape[1], BLOCK)
    _launch(_to_inputs, "bf16x6", n_programs, 1, x, hidden, output, grad_outputs, into)
    return into


def weight_gradients(
    x: Float[Tensor, "L N F"], hidden: Tensor, output: Tensor, grad_outputs: Tensor
) -> tuple[Float[Tensor, "H C"], Float[Tensor, "K H"]]:
    """The gradients of ``hidden`` and ``output``."""
    n_programs = min(triton.cdiv(x.shape[1], BLOCK), 2 * _processors(x.device))
    n_chunks = triton.cdiv(len(hidden), CHUNK)
    sums = x.new_empty(n_programs, *hidden.shape), x.new_empty(n_programs, *output.shape)
    _launch(_to_weights, "tf32x3", n_programs, n_chunks, x, hidden, output, grad_outputs, *sums)
    return sums[0].sum(dim=0), sums[1].sum(dim=0)


def _launch(
    kernel, precision: str, n_programs: int, n_chunks: int, x: Tensor, hidden: Tensor, output: Tensor, *others
):
    n_groups, n_points, group = x.shape
    if n_points == 0:
        return
    with torch.cuda.device_of(x):
        kernel[n_programs, n_chunks](
            x,
            hidden,
            output,
            *others,
            n_points,
            F=group,
            C=n_groups * group,
            CP=max(16, triton.next_power_of_2(n_groups * group)),
            H=len(hidden),
            HC=CHUNK,
            K=len(output),
            KP=max(16, triton.next_power_of_2(len(output))),
            B=BLOCK,
            PRECISION="ieee" if _is_interpreted() else precision,
            num_stages=1,
        )


def _is_interpreted() -> bool:
    return not isinstance(_evaluate, triton.JITFunction)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# ---------------------------------------------------------------------------------------------
# Kernels. No type checks: Triton compiles a function, not a checking wrapper around it.


@triton.jit(do_not_specialize=["n_points"])
@no_type_check
def _evaluate(
    x,
    hidden,
    output,
    outputs,
    n_points,
    F: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    H: tl.constexpr,
    HC: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    points = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    values = _load_inputs(x, points, n_points, F, C, CP)
    sums = tl.zeros((B, KP), tl.float32)
    for first in tl.static_range(0, H, HC):
        h = first + tl.arange(0, HC)
        w_in = _load(hidden, h, H, tl.arange(0, CP), C)
        w_out = _load(output, tl.arange(0, KP), K, h, H)
        # NaN stays NaN, as in torch.
        active = tl.maximum(_dot(values, tl.trans(w_in), PRECISION), 0.0, propagate_nan=tl.PropagateNan.ALL)
        sums += _dot(active, tl.trans(w_out), PRECISION)
    _store(outputs, points, n_points, tl.arange(0, KP), K, sums)


@triton.jit(do_not_specialize=["n_points"])
@no_type_check
def _to_inputs(
    x,
    hidden,
    output,
    grad_outputs,
    grad_x,
    n_points,
    F: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    H: tl.constexpr,
    HC: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    points = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    values = _load_inputs(x, points, n_points, F, C, CP)
    grads = _load(grad_outputs, points, n_points, tl.arange(0, KP), K)
    sums = tl.zeros((B, CP), tl.float32)
    for first in tl.static_range(0, H, HC):
        h = first + tl.arange(0, HC)
        w_in = _load(hidden, h, H, tl.arange(0, CP), C)
        w_out = _load(output, tl.arange(0, KP), K, h, H)
        before = _dot(values, tl.trans(w_in), PRECISION)
        sums += _dot(tl.where(before <= 0, 0.0, _dot(grads, w_out, PRECISION)), w_in, PRECISION)
    at, mask = _inputs(points, n_points, F, C, CP)
    tl.store(grad_x + at, sums, mask=mask)


@triton.jit(do_not_specialize=["n_points"])
@no_type_check
def _to_weights(
    x,
    hidden,
    output,
    grad_outputs,
    hidden_sums,
    output_sums,
    n_points,
    F: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    H: tl.constexpr,
    HC: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of hidden neurons, summed over every n-th block of points; neurons are rows here."""
    program = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HC + tl.arange(0, HC)
    i, o = tl.arange(0, CP), tl.arange(0, KP)
    w_in = _load(hidden, h, H, i, C)
    w_out = tl.trans(_load(output, o, K, h, H))
    to_hidden = tl.zeros((HC, CP), tl.float32)
    to_output = tl.zeros((HC, KP), tl.float32)
    for block in range(program, tl.cdiv(n_points, B), tl.num_programs(0)):
        points = block * B + tl.arange(0, B)
        values = _load_inputs(x, points, n_points, F, C, CP)
        grads = _load(grad_outputs, points, n_points, o, K)
        before = _dot(w_in, tl.trans(values), PRECISION)
        to_output += _dot(tl.maximum(before, 0.0, propagate_nan=tl.PropagateNan.ALL), grads, PRECISION)
        to_hidden += _dot(
            tl.where(before <= 0, 0.0, _dot(w_out, tl.trans(grads), PRECISION)), values, PRECISION
        )
    _store(hidden_sums + program * H * C, h, H, i, C, to_hidden)
    _store(output_sums + program * K * H, o, K, h, H, tl.trans(to_output))


@triton.jit
@no_type_check
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
@no_type_check
def _inputs(points, n_points, F: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """Where the inputs of points stand, and which there are."""
    c = tl.arange(0, CP)
    at = (c // F)[None, :].to(tl.int64) * (n_points * F) + points[:, None] * F + (c % F)[None, :]
    return at, (points < n_points)[:, None] & (c < C)[None, :]


@triton.jit
@no_type_check
def _load_inputs(x, points, n_points, F: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    at, mask = _inputs(points, n_points, F, C, CP)
    return tl.load(x + at, mask=mask, other=0.0)


@triton.jit
@no_type_check
def _load(matrix, rows, n_rows, columns, n_columns):
    """Some rows and columns of a matrix, and zeros beyond it."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(matrix + rows[:, None] * n_columns + columns[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def _store(matrix, rows, n_rows, columns, n_columns, values):
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(matrix + rows[:, None] * n_columns + columns[None, :], values, mask=mask)
