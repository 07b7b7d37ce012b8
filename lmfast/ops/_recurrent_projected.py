"""LSTM layers with a projected state, by the loop of plain ones.

The state that the gates meet is ``W_hr (o tanh c)``, so that they meet ``o tanh c`` by one matrix
``W_hh W_hr`` (4H, H): a plain LSTM of that matrix, whose outputs are projected in one product. A
step multiplies by 4 H^2 numbers instead of 5 H P, which the loop makes up for where PyTorch's dozen
operators per step are the larger part: few rows of a small state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast._transforms import transform_of
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._linear_cpu import fp32_product, longest_chain
from lmfast.ops._recurrent import cpu_layer
from lmfast.ops._recurrent_products import first_rows, sum_over_rows
from lmfast.ops._recurrent_reference import Layer, Loop

# One row, P = H / 4, forward and backward on one core of Zen 4: H 128 19 times as fast as PyTorch,
# 256 2.6, 512 1.2 with a slower forward; 8 rows of 256 1.2.
_MOST_WEIGHTS, _MOST_WORK = 1 << 18, 1 << 21


def runs_projected(x: Tensor, hidden: int, batch: int) -> bool:
    """Whether `projected_layer` is faster than PyTorch's loop, and as exact."""
    weights = 4 * hidden * hidden
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if weights > _MOST_WEIGHTS:
        return False
    if isinstance(batch, torch.SymInt) and torch.compiler.is_exporting():
        return True  # PyTorch's loop would be unrolled for one length
    return weights * batch <= _MOST_WORK


class _Projection(torch.autograd.Function):
    """h W_hr^T in chains as short as the layer's other sums: one chain over H, as in PyTorch's
    product of all rows, has 1.2 times the error of the product of a step, its largest 2 times."""

    @staticmethod
    def forward(h: Tensor, w_hr: Tensor, batch: int) -> Tensor:
        return fp32_product(h, w_hr, chunk=longest_chain(h.shape[1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.batch = inputs[2]
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        h, w_hr = ctx.saved_tensors
        if recording_backward():
            return *differentiate(F.linear, (h, w_hr), (dy,)), None
        dh = dw = None
        if ctx.needs_input_grad[0]:
            dh = fp32_product(dy, w_hr.t(), chunk=longest_chain(dy.shape[1]))
        if ctx.needs_input_grad[1]:
            dw = sum_over_rows(dy, h, ctx.batch)
        return dh, dw, None


def projected_layer(
    x: Tensor, layer: Layer, w_hr: Tensor, loop: Loop
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer whose state is projected; differentiable by its parts.

    Args:
        x: (N, D).
        layer: h0 is (B, P), w_hh (4H, P), c0 (B, H).
        w_hr: (P, H).
        loop: see there.

    Returns:
        y (N, P), h_n (B, P), c_n (B, H).
    """
    h0, w_ih, w_hh = layer.h0, layer.w_ih, layer.w_hh
    if h0 is not None:
        # What the gates get from the state before the first step comes with its input.
        rows = first_rows(loop.batch_sizes, loop.batch, loop.reverse, x.shape[0])
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop)
        extra = h0.new_zeros(x.shape[0], h0.shape[1]).index_copy(0, rows, h0)
        x, w_ih = torch.cat((x, extra), 1), torch.cat((w_ih, w_hh), 1)
    plain = layer._replace(h0=None, w_ih=w_ih, w_hh=w_hh @ w_hr)
    y, h_n, c_n = cpu_layer(x, plain, loop)
    if transform_of(y, w_hr):
        return F.linear(y, w_hr), F.linear(h_n, w_hr), c_n
    y, h_n = (apply(_Projection, h, w_hr, loop.batch) for h in (y, h_n))
    return y, h_n, c_n
