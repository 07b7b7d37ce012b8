"""What elman_rnn, lstm and gru share: one layer over rows, its C++ loop over time, its gradients.

The input's product with its weights, and every gradient that does not depend on the order of time,
is one matrix product over all steps (`fp32_product`). The loop is a kernel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmfast._transforms import in_transform, transform_of
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import define, needs_grad, unsupported_by_cpu_kernels
from lmfast.ops._linear_cpu import fp32_product
from lmfast.ops._recurrent_bf16 import bf16_layer, runs_in_bf16
from lmfast.ops._recurrent_products import (
    KEPT_GATES,
    backward_fake,
    gradients_of_products,
    split_biases,
)
from lmfast.ops._recurrent_reference import (
    CELLS,
    Layer,
    Loop,
    flat_reference,
    loop_arguments,
    made_layer,
    reference_layer,
)
from lmfast.ops._recurrent_step import MAX_ROWS, step_op


def forward_fake(
    projected: Tensor,
    w_hh: Tensor,
    hidden_bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    batch: int,
    cell: int,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, hidden = projected.shape[0], w_hh.shape[1]
    kept = KEPT_GATES[CELLS[cell]] if keep else 0
    lstm = CELLS[cell] == "lstm"
    cells = keep and CELLS[cell] in ("lstm", "gru_textbook")
    return (
        projected.new_empty(rows, hidden),
        projected.new_empty(batch, hidden),
        projected.new_empty(batch if lstm else 0, hidden),
        projected.new_empty(rows if kept else 0, kept * hidden),
        projected.new_empty(rows if cells else 0, hidden),
    )


_forward_op = define(
    "recurrent_forward(Tensor projected, Tensor w_hh, Tensor? hidden_bias, Tensor? h0, Tensor? c0, "
    "Tensor? batch_sizes, SymInt batch, int cell, bool reverse, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward_fake,
)
backward_op = define(
    "recurrent_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor y, Tensor gates, "
    "Tensor cells, Tensor w_hh, Tensor? h0, Tensor? c0, Tensor? batch_sizes, SymInt batch, "
    "int cell, bool reverse) -> (Tensor, Tensor)",
    backward_fake,
)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def input_product(x: Tensor, layer: Layer, cell: str) -> tuple[Tensor, Tensor | None]:
    """The input products with every bias that can be added beforehand, and the one that cannot."""
    bias, hidden_bias = split_biases(layer.b_ih, layer.b_hh, cell)
    return fp32_product(x, layer.w_ih, bias), hidden_bias


class LayerFunction(torch.autograd.Function):
    """x, the fields of a `Layer` and of a `Loop`, and whether a backward will follow."""

    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        layer, loop, keep = Layer(*args[:6]), Loop(*args[6:10]), args[10]
        projected, hidden_bias = input_product(x, layer, loop.cell)
        states = (_contiguous(layer.h0), _contiguous(layer.c0))
        return _forward_op(
            projected, layer.w_hh, _contiguous(hidden_bias), *states, *loop_arguments(loop), keep
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sizes, *ctx.loop = inputs[7:11]
        y, _, c_n, gates, cells = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gates, cells, *(() if ctx.loop[1] == "lstm" else (c_n,)))
        ctx.save_for_backward(*inputs[:7], sizes, y, gates, cells)

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, *_: Any) -> tuple[Any, ...]:
        *inputs, sizes, y, gates, cells = ctx.saved_tensors
        x, layer, loop = inputs[0], Layer(*inputs[1:]), Loop(sizes, *ctx.loop)
        if loop.cell != "lstm":
            dc_n = None  # torch.compile hands in zeros for a result that has no gradient
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * 12
        if recording_backward():
            again = partial(flat_reference, loop=loop)
            return *differentiate(again, inputs, (dy, dh_n, dc_n)), *_NO_GRADS
        with torch.autocast(y.device.type, enabled=False):
            dgates, carry = backward_op(
                _contiguous(dy),
                _contiguous(dh_n),
                _contiguous(dc_n),
                y,
                gates,
                cells,
                layer.w_hh,
                _contiguous(layer.h0),
                _contiguous(layer.c0),
                *loop_arguments(loop),
            )
            grads = gradients_of_products(
                ctx.needs_input_grad[:7], x, layer, loop, (y, cells), dgates, carry, dh_n
            )
        return *grads, *_NO_GRADS


_NO_GRADS = (None,) * 5


def unsupported_by_recurrent_kernels(x: Tensor, *rest: Any) -> str | None:
    """Why the C++ loop cannot take these arguments, or None."""
    if x.dtype == torch.float64:
        return "no kernel for torch.float64"
    return unsupported_by_cpu_kernels(x, *rest[:6])


def one_step(tensors: tuple[Any, ...], cell: str) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., H) and both states (B, H) after the one step of x (..., D), all of them float32."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = tensors
    if b_ih is None and b_hh is not None:
        b_ih = torch.zeros_like(b_hh)
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    h0 = None if h0 is None else h0.contiguous()[None]
    c0 = None if c0 is None else c0.contiguous()[None]
    y, h_n, c_n = step_op(x.contiguous(), h0, c0, weights, 1, CELLS.index(cell), False)
    return y, h_n[0], c_n[0] if cell == "lstm" else c_n.view(0, y.shape[-1])


def is_one_step(tensors: tuple[Any, ...], batch: int) -> bool:
    """Whether `one_step` is the fastest way for x (..., D) with one row for each of the batch."""
    fits = 0 < batch <= MAX_ROWS and tensors[0].shape[-1] > 0
    return fits and not in_transform() and not needs_grad(*tensors)


# Bytes of input products that a call without a backward makes at a time, so that it does not need
# G times the memory of its output. It costs nothing and wins nothing: on two cores of Zen 4 LSTM
# (B 32, T 256, H 512) takes 191 ms so and 205 whole, GRU (64, 70, 512) 73 and 74, while pieces of
# 2 MB, which would stay in L2, take 218 and 85: each reads W_ih and W_hh (4 MB each) once more.
_MOST_PRODUCTS = 1 << 25


def _pieces(x: Tensor, layer: Layer, loop: Loop) -> list[tuple[int, int]]:
    """The steps in pieces of at most `_MOST_PRODUCTS`, in the order of the loop."""
    row = 4 * layer.w_hh.shape[0] * max(1, loop.batch)
    steps = x.shape[0] // max(1, loop.batch)
    if loop.batch_sizes is not None:
        steps = loop.batch_sizes.shape[0]
    length = max(1, _MOST_PRODUCTS // row)
    found = [(first, min(steps, first + length)) for first in range(0, steps, length)]
    return found[::-1] if loop.reverse else found


def _by_pieces(
    x: Tensor, layer: Layer, loop: Loop, pieces: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward alone, some steps after the other."""
    sizes, batch, hidden = loop.batch_sizes, loop.batch, layer.w_hh.shape[1]
    ends = None if sizes is None else [0, *sizes.cumsum(0).tolist()]
    y = x.new_empty(x.shape[0], hidden)
    state = [x.new_zeros(batch, hidden) if s is None else s.clone() for s in (layer.h0, layer.c0)]
    for first, past in pieces:
        begin, end = (first * batch, past * batch) if ends is None else (ends[first], ends[past])
        n = batch if sizes is None else int(sizes[first])
        piece = loop._replace(batch_sizes=None if sizes is None else sizes[first:past], batch=n)
        given = layer._replace(h0=state[0][:n], c0=state[1][:n] if loop.cell == "lstm" else None)
        y[begin:end], *new = LayerFunction.forward(x[begin:end], *given, *piece, False)[:3]
        for old, now in zip(state, new, strict=True):
            if now.shape[0]:
                old[:n] = now
    return y, state[0], state[1] if loop.cell == "lstm" else state[1][:0]


def cpu_layer(x: Tensor, layer: Layer, loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
    """``reference_layer`` by the C++ loop. Narrow dtypes are widened: the state is fp32."""
    if transform_of(x, *layer):
        return reference_layer(x, layer, loop)
    batch, cell = loop.batch, loop.cell
    if runs_in_bf16(x, layer.w_hh, batch, cell):
        with torch.autocast("cpu", enabled=False):
            return bf16_layer(x, layer, loop)
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return cpu_layer(x, layer, loop)
    dtype = x.dtype
    tensors: tuple[Any, ...] = (x, *layer)
    if any(t is not None and t.dtype != torch.float32 for t in tensors):
        tensors = tuple(None if t is None else t.float() for t in tensors)
    if loop.batch_sizes is None and x.shape[0] == batch and is_one_step(tensors, batch):
        y, h_n, c_n = one_step(tensors, cell)
        return y.to(dtype), h_n.to(dtype), c_n.to(dtype)
    keep = needs_grad(*tensors)
    pieces = [] if keep or torch.compiler.is_compiling() else _pieces(x, layer, loop)
    if len(pieces) > 1:
        given = made_layer(tensors[1:])
        y, h_n, c_n = _by_pieces(tensors[0], given, loop, pieces)
        return y.to(dtype), h_n.to(dtype), c_n.to(dtype)
    run: Any = (lambda *args: apply(LayerFunction, *args)) if keep else LayerFunction.forward
    y, h_n, c_n, *_ = run(*tensors, *loop, keep)
    if dtype == torch.float32:
        return y, h_n, c_n
    return y.to(dtype), h_n.to(dtype), c_n.to(dtype)
