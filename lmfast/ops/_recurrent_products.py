"""What the loops over time leave to whole matrix products: every gradient but the gates', and the
biases that can be added to the input's product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmfast.ops._linear_cpu import fp32_product
from lmfast.ops._recurrent_reference import CELLS, Layer, Loop

# Vectors of H per row: what the forward keeps besides y, and the gradients of the gates.
KEPT_GATES = {"tanh": 0, "relu": 0, "lstm": 4, "gru": 4, "gru_textbook": 3}
GATE_GRADIENTS = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 4, "gru_textbook": 3}


def gradients_fake(y: Tensor, w_hh: Tensor, batch: int, cell: int) -> tuple[Tensor, Tensor]:
    """What a loop's backward returns: the gates' gradients and the carry."""
    kept, hidden = KEPT_GATES[CELLS[cell]], w_hh.shape[1]
    return (
        y.new_empty(y.shape[0], GATE_GRADIENTS[CELLS[cell]] * hidden),
        y.new_empty(batch if kept else 0, hidden),
    )


def backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    """Of the operators of one layer's backward."""
    y, w_hh, (batch, cell) = args[3], args[6], args[10:12]
    return gradients_fake(y, w_hh, batch, cell)


def split_biases(
    b_ih: Tensor | None, b_hh: Tensor | None, cell: str
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the input's product, and to the hidden part of the GRU's n."""
    hidden_bias = None
    if b_hh is not None and cell == "gru":
        # n's hidden bias is multiplied by the reset gate.
        hidden = b_hh.shape[0] // 3
        hidden_bias = b_hh[2 * hidden :]
        b_hh = torch.cat((b_hh[: 2 * hidden], torch.zeros_like(hidden_bias)))
    return b_ih if b_hh is None else b_hh if b_ih is None else b_ih + b_hh, hidden_bias


def gradients_of_products(
    needed: Sequence[bool],
    x: Tensor,
    layer: Layer,
    loop: Loop,
    states: tuple[Tensor, Tensor],
    dgates: Tensor,
    carry: Tensor,
    dh_n: Tensor | None,
) -> list[Tensor | None]:
    """From the gradients of the gates to those of everything else: one product for each.

    Args:
        needed: for x, h0, c0, w_ih, w_hh, b_ih, b_hh, whether it needs a gradient.
        x, layer: what is looked at, in the dtype of the products.
        loop: see there.
        states: y, and what ``keeps_cells`` in the kernels' header says.
        dgates: (N, gate gradients * H), from the loop.
        carry: (B, H), what reaches the first state past the products.
        dh_n: the gradient of the final state.

    Returns:
        One gradient or None for each of ``needed``.
    """
    h0, w_ih, w_hh = layer.h0, layer.w_ih, layer.w_hh
    y, cells = states
    sizes, batch, cell, reverse = loop
    hidden = w_hh.shape[1]
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needed
    # GRU: (n before the reset, r, z, n after it); the first three meet the hidden weights. The
    # textbook's n meets r h instead of h, and what that gives h is in carry.
    from_input = dgates[:, hidden:] if cell == "gru" else dgates
    meeting = {"gru": 3 * hidden, "gru_textbook": 2 * hidden}.get(cell, dgates.shape[1])
    from_state = dgates[:, :meeting]
    grads: list[Tensor | None] = [None] * 7
    if need_x:
        grads[0] = fp32_product(from_input, w_ih.t())
    if need_h0:
        first = from_state[first_rows(sizes, batch, reverse, x.shape[0])]
        if x.shape[0] == 0:
            grads[1] = dh_n
        elif cell == "gru":
            dn, drz = first[:, :hidden], first[:, hidden:]
            past = carry.to(first.dtype) + fp32_product(dn, w_hh[2 * hidden :].t())
            grads[1] = past.add_(fp32_product(drz, w_hh[: 2 * hidden].t()))
        elif cell == "gru_textbook":
            past = fp32_product(first, w_hh[: 2 * hidden].t())
            grads[1] = past.add_(carry.to(first.dtype))
        else:
            grads[1] = fp32_product(first, w_hh.t())
    if need_c0 and cell == "lstm":
        grads[2] = carry
    if need_w_ih:
        grads[3] = fp32_product(from_input.t(), x.t())
    if need_w_hh:
        dw = _state_weight_gradient(from_state, y, h0, sizes, batch, reverse)
        if cell == "gru":
            dw = torch.cat((dw[hidden:], dw[:hidden]))
        elif cell == "gru_textbook":
            dw = torch.cat((dw, sum_over_rows(dgates[:, 2 * hidden :], cells, batch)))
        grads[4] = dw
    if need_b_ih or need_b_hh:
        total = dgates.sum(0, dtype=torch.float32)
        if need_b_ih:
            grads[5] = total[hidden:] if cell == "gru" else total
        if need_b_hh and cell == "gru":
            grads[6] = torch.cat((total[hidden : 3 * hidden], total[:hidden]))
        elif need_b_hh:
            grads[6] = total.clone() if need_b_ih else total
    return grads


def first_rows(sizes: Tensor | None, batch: int, reverse: bool, rows: int) -> slice | Tensor:
    """The row of every sequence's first step in the order of the loop."""
    if not reverse:
        return slice(0, batch)
    if sizes is None:
        return slice(rows - batch, rows)
    sequence = torch.arange(batch)
    last = (sizes[:, None] > sequence).sum(0) - 1
    return (sizes.cumsum(0) - sizes)[last] + sequence


# One product adds its rows in one chain, PyTorch's layers each step's and then the steps': in the
# gradient of w_hh that halves the error of a few hundred rows (B 20, T 15: 2.0 times PyTorch's as
# one product, 1.1 in chunks). From a thousand rows on the blocks of the product do as much, and a
# gradient that does not fit L2 would be read and written once more for each chunk.
_LEAST_ROWS, _MOST_CHUNKS, _MOST_CHUNKED_ROWS, _MOST_CHUNKED_NUMBERS = 16, 16, 512, 1 << 18


def sum_over_rows(a: Tensor, b: Tensor, batch: int) -> Tensor:
    """a^T b, its sum in chunks of whole steps where that is more exact and costs little."""
    rows, size = a.shape[0], a.shape[1] * b.shape[1]
    least = max(_LEAST_ROWS, rows // _MOST_CHUNKS)
    chunk = batch * -(-least // batch) if batch > 1 else rows
    if not chunk < rows <= _MOST_CHUNKED_ROWS or size > _MOST_CHUNKED_NUMBERS:
        return fp32_product(a.t(), b.t())
    return fp32_product(a.t(), b.t(), chunk=chunk)


def _state_weight_gradient(
    dgates: Tensor, y: Tensor, h0: Tensor | None, sizes: Tensor | None, batch: int, reverse: bool
) -> Tensor:
    """Sum over steps of dgates_t^T h_{t-1}."""
    rows = y.shape[0]
    # Rows from step 1 on, and the rows of the same sequences one step earlier.
    later: slice | Tensor = slice(batch, rows)
    earlier: slice | Tensor = slice(0, max(0, rows - batch))
    if sizes is not None:
        behind = torch.repeat_interleave(sizes[:-1], sizes[1:], output_size=rows - batch)
        earlier = torch.arange(batch, rows) - behind
    if reverse:
        later, earlier = earlier, later
    dw = sum_over_rows(dgates[later], y[earlier], batch)
    if h0 is not None and rows:
        dw += fp32_product(dgates[first_rows(sizes, batch, reverse, rows)].t(), h0.t())
    return dw
