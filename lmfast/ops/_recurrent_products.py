"""What the loops over time leave to whole matrix products: every gradient but the gates'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Vectors of H per row: what the forward keeps besides y, and the gradients of the gates.
KEPT_GATES = {"tanh": 0, "relu": 0, "lstm": 4, "gru": 4, "gru_textbook": 3}
GATE_GRADIENTS = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 4, "gru_textbook": 3}


def gradients_of_products(
    needed: Sequence[bool],
    operands: tuple[Any, ...],
    how: tuple[Any, ...],
    states: tuple[Tensor, Tensor],
    dgates: Tensor,
    carry: Tensor,
    dh_n: Tensor | None,
) -> list[Tensor | None]:
    """From the gradients of the gates to those of everything else: one product for each.

    Args:
        needed: for x, h0, c0, w_ih, w_hh, b_ih, b_hh, whether it needs a gradient.
        operands: x, h0, w_ih, w_hh in the dtype of the products.
        how: batch_sizes, batch, cell, reverse, as in ``reference_layer``.
        states: y, and what ``keeps_cells`` in the kernels' header says.
        dgates: (N, gate gradients * H), from the loop.
        carry: (B, H), what reaches the first state past the products.
        dh_n: the gradient of the final state.

    Returns:
        One gradient or None for each of ``needed``.
    """
    x, h0, w_ih, w_hh = operands
    y, cells = states
    sizes, batch, cell, reverse = how
    hidden = w_hh.shape[1]
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needed
    # GRU: (n before the reset, r, z, n after it); the first three meet the hidden weights. The
    # textbook's n meets r h instead of h, and what that gives h is in carry.
    from_input = dgates[:, hidden:] if cell == "gru" else dgates
    meeting = {"gru": 3 * hidden, "gru_textbook": 2 * hidden}.get(cell, dgates.shape[1])
    from_state = dgates[:, :meeting]
    grads: list[Tensor | None] = [None] * 7
    if need_x:
        grads[0] = torch.mm(from_input, w_ih)
    if need_h0:
        first = from_state[_first_rows(sizes, batch, reverse, x.shape[0])]
        if x.shape[0] == 0:
            grads[1] = dh_n
        elif cell == "gru":
            dn, drz = first[:, :hidden], first[:, hidden:]
            grads[1] = torch.addmm(carry.to(first.dtype), dn, w_hh[2 * hidden :]).addmm_(
                drz, w_hh[: 2 * hidden]
            )
        elif cell == "gru_textbook":
            grads[1] = torch.addmm(carry.to(first.dtype), first, w_hh[: 2 * hidden])
        else:
            grads[1] = torch.mm(first, w_hh)
    if need_c0 and cell == "lstm":
        grads[2] = carry
    if need_w_ih:
        grads[3] = torch.mm(from_input.t(), x)
    if need_w_hh:
        dw = _state_weight_gradient(from_state, y, h0, sizes, batch, reverse)
        if cell == "gru":
            dw = torch.cat((dw[hidden:], dw[:hidden]))
        elif cell == "gru_textbook":
            dw = torch.cat((dw, torch.mm(dgates[:, 2 * hidden :].t(), cells)))
        grads[4] = dw
    if need_b_ih or need_b_hh:
        total = dgates.sum(0, dtype=torch.float32)
        if cell == "gru":
            grads[5] = total[hidden:]
            grads[6] = torch.cat((total[hidden : 3 * hidden], total[:hidden]))
        else:
            grads[5], grads[6] = total, total.clone()
    return grads


def _first_rows(sizes: Tensor | None, batch: int, reverse: bool, rows: int) -> slice | Tensor:
    """The row of every sequence's first step in the order of the loop."""
    if not reverse:
        return slice(0, batch)
    if sizes is None:
        return slice(rows - batch, rows)
    sequence = torch.arange(batch)
    last = (sizes[:, None] > sequence).sum(0) - 1
    return (sizes.cumsum(0) - sizes)[last] + sequence


def _state_weight_gradient(
    dgates: Tensor, y: Tensor, h0: Tensor | None, sizes: Tensor | None, batch: int, reverse: bool
) -> Tensor:
    """Sum over steps of dgates_t^T h_{t-1}."""
    rows = y.shape[0]
    # Rows from step 1 on, and the rows of the same sequences one step earlier.
    later: slice | Tensor = slice(batch, rows)
    earlier: slice | Tensor = slice(0, max(0, rows - batch))
    if sizes is not None:
        earlier = torch.arange(batch, rows) - torch.repeat_interleave(sizes[:-1], sizes[1:])
    if reverse:
        later, earlier = earlier, later
    dw = torch.mm(dgates[later].t(), y[earlier])
    if h0 is not None and rows:
        dw.addmm_(dgates[_first_rows(sizes, batch, reverse, rows)].t(), h0)
    return dw
