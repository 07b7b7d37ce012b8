"""torch.nn's recurrent cells, and the textbook's GRU cell.

Without gradients one row's step of an LSTM or a GRU is one operator call that reads the weights
where they lie: 1.0 to 1.2 times as fast as torch.nn's at H = 128 to 512. Everything else is left to
torch.nn, whose two products and fused rest are 1.2 to 2 times as fast as a sequence operator of
length one. The textbook's GRU, which torch.nn lacks, takes that operator then. For whole sequences
and for stacks the layers are the fast way, step by step too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfast import ops
from lmfast.ops._recurrent_reference import CELLS
from lmfast.ops._recurrent_step import is_plain, may_step, step_op

# Rows up to which the step is not behind torch.nn's cells; at four it takes 1.1 times as long.
_MAX_ROWS = 1


def _stepped(
    module: nn.RNNCellBase, op: str, cell: str, x: Any, states: tuple[Any, ...]
) -> tuple[Tensor, ...] | None:
    """The states after the step in one call, or None where that is not possible."""
    if (
        not may_step(op)
        or not is_plain(x)
        or x.dim() not in (1, 2)
        or not is_plain(module.weight_ih)
    ):
        return None
    rows = x if x.dim() == 2 else x[None]
    if not 0 < rows.shape[0] <= _MAX_ROWS or rows.shape[1] != module.input_size:
        return None
    shape = (*x.shape[:-1], module.hidden_size)
    if not all(is_plain(s) and s.shape == shape for s in states):
        return None
    given = [s.view(1, rows.shape[0], module.hidden_size) for s in states]
    h0, c0 = (*given, None, None)[:2]
    _, h, c = step_op(rows, h0, c0, _weights(module), 1, CELLS.index(cell), False)
    return h.view(shape), c.view(shape) if cell == "lstm" else c


def _weights(module: nn.RNNCellBase) -> tuple[Tensor, ...]:
    if not module.bias:
        return module.weight_ih, module.weight_hh
    return module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh


# Two products and a tanh leave nothing to fuse: torch.nn's cell takes 14 to 50 us a row at H = 128
# to 512, the operator 1.1 to 1.3 times as long.
RNNCell = nn.RNNCell


class LSTMCell(nn.LSTMCell):
    """``torch.nn.LSTMCell`` with a row's step in one operator call.

    ``c' = s(f) c + s(i) tanh(g)``, ``h' = s(o) tanh(c')``.

    Args:
        Those of ``torch.nn.LSTMCell``; parameters, state_dict, call and errors are its own.

    Backends: cpu (C++) without gradients for one row in float32, else ``torch.nn.LSTMCell``.

    Example:
        >>> import lmfast, torch
        >>> h, c = lmfast.nn.LSTMCell(3, 4)(torch.zeros(2, 3))
        >>> h.shape, c.shape
        (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        states = () if hx is None else tuple(hx)
        if len(states) in (0, 2):
            stepped = _stepped(self, "lstm", "lstm", input, states)
            if stepped is not None:
                return stepped[0], stepped[1]
        return super().forward(input, hx)


class GRUCell(nn.GRUCell):
    """``torch.nn.GRUCell`` with a row's step in one operator call, or the textbook's form.

    ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``, ``h' = (1 - z) n + z h``; the textbook's resets
    before the product, ``n = tanh(W_in x + b_in + W_hn (r h) + b_hn)``, and lets z take in the new,
    ``h' = (1 - z) h + z n``.

    Args:
        input_size, hidden_size, bias, device, dtype: as of ``torch.nn.GRUCell``, whose parameters,
            state_dict, call and errors these are.
        reset_after: torch's form, or the textbook's.

    Backends: cpu (C++) without gradients for one row in float32, else ``torch.nn.GRUCell`` or, for
    the textbook's form, those of `lmfast.ops.gru`.

    Source: Cho et al. 2014 (the textbook's form), arXiv:1406.1078.

    Example:
        >>> import lmfast, torch
        >>> lmfast.nn.GRUCell(3, 4, reset_after=False)(torch.zeros(2, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.reset_after = reset_after

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        states = () if hx is None else (hx,)
        cell = "gru" if self.reset_after else "gru_textbook"
        stepped = _stepped(self, "gru", cell, input, states)
        if stepped is not None:
            return stepped[0]
        # torch.nn's forward has the words for what the textbook's operator would reject.
        if self.reset_after or not self._is_step(input, states):
            return super().forward(input, hx)
        rows = [t if t.dim() == 2 else t[None] for t in (input, *states)]
        h = rows[1] if states else None
        _, h = ops.gru(rows[0][:, None], h, _weights(self), reset_after=False)
        return h if input.dim() == 2 else h[0]

    def _is_step(self, input: object, states: tuple[Any, ...]) -> bool:
        if not isinstance(input, Tensor) or input.dim() not in (1, 2):
            return False
        shape = (*input.shape[:-1], self.hidden_size)
        return (
            input.shape[-1] == self.input_size
            and all(t.dtype == self.weight_ih.dtype for t in (input, *states))
            and all(s.shape == shape for s in states)
        )

    def extra_repr(self) -> str:
        form = "" if self.reset_after else ", reset_after=False"
        return super().extra_repr() + form
