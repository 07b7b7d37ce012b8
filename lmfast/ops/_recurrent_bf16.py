"""Recurrent layers with bf16 products, on AMX or by AVX512-BF16: bf16 calls, and fp32 ones where
the user allows it.

The products over all steps are PyTorch's, in bf16; the loop over time is a kernel that keeps the
state, the sums and the gates in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmfast import _extension
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import define, needs_grad
from lmfast.ops._precision import bf16_products_allowed
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
)

# Rows of a tile: fewer leave it unused, and the products over all steps small.
_MIN_ROWS = 16


def _forward_fake(
    projected: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    hidden_bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    batch: int,
    cell: int,
    reverse: bool,
    keep: bool,
    wide: bool,
) -> tuple[Tensor, ...]:
    rows, hidden = projected.shape[0], w_hh.shape[1]
    kept = KEPT_GATES[CELLS[cell]] if keep else 0
    lstm = CELLS[cell] == "lstm"
    return (
        projected.new_empty(rows, hidden),
        projected.new_empty(rows if wide else 0, hidden, dtype=torch.float32),
        projected.new_empty(batch, hidden, dtype=torch.float32),
        projected.new_empty(batch if lstm else 0, hidden, dtype=torch.float32),
        projected.new_empty(rows if kept else 0, kept * hidden),
        projected.new_empty(rows if lstm and keep else 0, hidden),
    )


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    dgates, carry = backward_fake(*args)
    return dgates, carry.float()


_forward_op = define(
    "recurrent_bf16_forward(Tensor projected, Tensor w_hh, Tensor? bias, Tensor? hidden_bias, "
    "Tensor? h0, Tensor? c0, Tensor? batch_sizes, SymInt batch, int cell, bool reverse, bool keep, "
    "bool wide) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
_backward_op = define(
    "recurrent_bf16_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor y, Tensor gates, "
    "Tensor cells, Tensor w_hh, Tensor? h0, Tensor? c0, Tensor? batch_sizes, SymInt batch, "
    "int cell, bool reverse) -> (Tensor, Tensor)",
    _backward_fake,
)


def _has_tiles() -> bool:
    return _extension.has_bf16_tiles()


# What torch.compiler.assume_constant_result sets; that function would import all of the compiler.
_has_tiles._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_in_bf16(x: Tensor, w_hh: Tensor, batch: int, cell: str) -> bool:
    """Whether a layer goes to the bf16 loop: asked before autocast is turned off."""
    if cell == "gru_textbook" or w_hh.shape[1] % 32 or x.shape[0] == 0:
        return False
    if x.dtype not in (torch.bfloat16, torch.float32) or not _has_tiles():
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not (x.dtype == torch.bfloat16 or cast or bf16_products_allowed()):
        return False
    # Last: a compiled graph is one for the answer, and an exported one is to serve all batches.
    if isinstance(batch, torch.SymInt) and torch.compiler.is_exporting():
        return False
    return batch >= _MIN_ROWS


def _narrow(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.bfloat16).contiguous()


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """y, h_n, c_n in x's dtype; then what the backward needs: x and y in bf16, gates, cells."""
        layer, loop, keep = Layer(*args[:6]), Loop(*args[6:10]), args[10]
        x16 = x.to(torch.bfloat16)
        projected = torch.mm(x16, layer.w_ih.to(torch.bfloat16).t())
        # They are added in fp32.
        bias, hidden_bias = split_biases(_float(layer.b_ih), _float(layer.b_hh), loop.cell)
        wide = x.dtype == torch.float32
        y16, y, h_n, c_n, gates, cells = _forward_op(
            projected,
            layer.w_hh.contiguous(),
            bias,
            _float(hidden_bias),
            _float(layer.h0),
            _float(layer.c0),
            *loop_arguments(loop),
            keep,
            wide,
        )
        kept = (x16, y16, gates, cells) if keep and wide else (gates, cells)
        # As they are where nothing has to be converted: PyTorch 2.11 loses the gradient of a result
        # that is made twice in a compiled forward.
        finals = (h_n, c_n) if wide else (h_n.to(x.dtype), c_n.to(x.dtype))
        return (y if wide else y16, *finals, *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, (sizes, *ctx.loop) = inputs[0], inputs[7:11]
        y, _, c_n, *kept = output
        x16, y16, gates, cells = kept if len(kept) == 4 else (x, y, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept, *(() if ctx.loop[1] == "lstm" else (c_n,)))
        ctx.save_for_backward(*inputs[:7], sizes, x16, y16, gates, cells)

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, *_: Any) -> tuple[Any, ...]:
        *inputs, sizes, x16, y16, gates, cells = ctx.saved_tensors
        layer, loop = Layer(*inputs[1:]), Loop(sizes, *ctx.loop)
        if loop.cell != "lstm":
            dc_n = None  # torch.compile hands in zeros for a result that has no gradient
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * 12
        if recording_backward():
            again = partial(flat_reference, loop=loop)
            return *differentiate(again, inputs, (dy, dh_n, dc_n)), *(None,) * 5
        with torch.autocast("cpu", enabled=False):
            narrow = made_layer(_narrow(t) for t in layer)
            dgates, carry = _backward_op(
                None if dy is None else dy.contiguous(),
                _float(dh_n),
                _float(dc_n),
                y16,
                gates,
                cells,
                layer.w_hh.contiguous(),
                narrow.h0,
                narrow.c0,
                *loop_arguments(loop),
            )
            found = gradients_of_products(
                ctx.needs_input_grad[:7], x16, narrow, loop, (y16, cells), dgates, carry, dh_n
            )
            grads = [
                None if g is None else g.to(t.dtype) for g, t in zip(found, inputs, strict=True)
            ]
        return *grads, *(None,) * 5


def bf16_layer(x: Tensor, layer: Layer, loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
    """``reference_layer`` by the bf16 loop, for calls that ``runs_in_bf16`` admits."""
    keep = needs_grad(x, *layer)
    run: Any = (lambda *args: apply(_Layer, *args)) if keep else _Layer.forward
    return run(x, *layer, *loop, keep)[:3]
