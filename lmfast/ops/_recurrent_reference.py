"""Recurrent layers in plain PyTorch, step by step: the reference, and the ``torch`` backend.

One layer, one direction. Rows are in time-major order, with as many rows per step as sequences are
still running: a padded batch has equally many, a PackedSequence fewer and fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast.ops._library import accumulation_dtype

# Their order is the kernels' numbers for them. gru_textbook resets before the product.
CELLS = ("tanh", "relu", "lstm", "gru", "gru_textbook")
GATES = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 3, "gru_textbook": 3}


class Layer(NamedTuple):
    """What one layer has in one direction: the states before its first step, and its weights.

    h0, c0: (B, H), None for zeros. w_ih (G*H, D), w_hh (G*H, H); b_ih, b_hh: (G*H,) or None.
    """

    h0: Tensor | None
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Loop(NamedTuple):
    """How a layer runs over its rows.

    batch_sizes: (T,) int64 on the CPU, rows per step, B first and never growing; None: B each.
    batch: B. cell: one of ``CELLS``. reverse: from each sequence's last step to its first.
    """

    batch_sizes: Tensor | None
    batch: int
    cell: str
    reverse: bool


def made_layer(fields: Iterable[Any]) -> Layer:
    """A `Layer` of these fields, absent ones at the end being None."""
    return Layer(*(*fields, None, None)[: len(Layer._fields)])


def loop_arguments(loop: Loop) -> tuple[Tensor | None, int, int, bool]:
    """``loop`` as the operators take it, cells by number."""
    return loop.batch_sizes, loop.batch, CELLS.index(loop.cell), loop.reverse


def cell_step(
    cell: str, projected: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step of ``cell``.

    Args:
        projected: (B, G*H), the input's product with its bias.
        h, c: (B, H), the states before the step; only the LSTM looks at c.
        w_hh, b_hh: (G*H, H) and (G*H,) or None.

    Returns:
        The states after the step.
    """
    if cell == "gru_textbook":
        hidden = h.shape[1]
        w_gates, w_new = w_hh.split((2 * hidden, hidden))
        b_gates, b_new = (None, None) if b_hh is None else b_hh.split((2 * hidden, hidden))
        p_gates, p_new = projected.split((2 * hidden, hidden), 1)
        r, z = torch.sigmoid(p_gates + F.linear(h, w_gates, b_gates)).chunk(2, 1)
        n = torch.tanh(p_new + F.linear(r * h, w_new, b_new))
        return (1 - z) * h + z * n, c
    recurrent = F.linear(h, w_hh, b_hh)
    if cell == "tanh":
        return torch.tanh(projected + recurrent), c
    if cell == "relu":
        return torch.relu(projected + recurrent), c
    if cell == "lstm":
        i, f, g, o = (projected + recurrent).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    p_r, p_z, p_n = projected.chunk(3, 1)
    h_r, h_z, h_n = recurrent.chunk(3, 1)
    r, z = torch.sigmoid(p_r + h_r), torch.sigmoid(p_z + h_z)
    n = torch.tanh(p_n + r * h_n)
    return (1 - z) * n + z * h, c


def reference_layer(
    x: Tensor, layer: Layer, loop: Loop, *, wide: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer over all steps.

    Args:
        x: (N, D), the rows of step 0, then of step 1, ...
        layer, loop: see there.
        wide: the dtype of the state and of all arithmetic; None: float32, or x's if that is wider.

    Returns:
        y (N, H), and the states (B, H) after each sequence's last step; the cell state is (0, H)
        except for the LSTM.
    """
    h0, c0, w_ih, w_hh, b_ih, b_hh = layer
    batch_sizes, batch, cell, reverse = loop
    wide = wide or accumulation_dtype(x.dtype)
    w_ih, w_hh = w_ih.to(wide), w_hh.to(wide)
    b_ih = None if b_ih is None else b_ih.to(wide)
    b_hh = None if b_hh is None else b_hh.to(wide)
    hidden = w_hh.shape[1]
    h = x.new_zeros(batch, hidden, dtype=wide) if h0 is None else h0.to(wide)
    c = x.new_zeros(batch, hidden, dtype=wide) if c0 is None else c0.to(wide)
    if batch_sizes is None:
        sizes = [batch] * (x.shape[0] // batch if batch else 0)
    else:
        sizes = batch_sizes.tolist()
    products = F.linear(x.to(wide), w_ih, b_ih)
    if not sizes:
        # No numbers, but a result that depends on everything: gradients are zeros, not missing.
        y = F.linear(products[:, :hidden], w_hh, b_hh)[:, :hidden]
        return y.to(x.dtype), h.to(x.dtype), (c if cell == "lstm" else c[:0]).to(x.dtype)
    projected = products.split(sizes)
    states: list[Tensor] = [h] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        h_new, c_new = cell_step(cell, projected[t], h[:n], c[:n], w_hh, b_hh)
        states[t] = h_new
        h = h_new if n == batch else torch.cat((h_new, h[n:]))
        c = c_new if n == batch else torch.cat((c_new, c[n:]))
    return (
        torch.cat(states).to(x.dtype),
        h.to(x.dtype),
        (c if cell == "lstm" else c[:0]).to(x.dtype),
    )


def flat_reference(*tensors: Tensor | None, loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_layer` of x and the fields of a `Layer`, for autograd."""
    x: Any = tensors[0]
    return reference_layer(x, made_layer(tensors[1:]), loop)
