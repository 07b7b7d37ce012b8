"""torch.nn's recurrent cells on the fused operators: one step of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfast import ops


def _is_step(cell: nn.RNNCellBase, input: object, states: tuple[Any, ...]) -> bool:
    """Whether input and states are what the operator takes; torch.nn rejects the rest."""
    if not isinstance(input, Tensor) or input.dim() not in (1, 2):
        return False
    weight = cell.weight_ih
    if input.dtype != weight.dtype or input.device != weight.device:
        return False
    shape = (*input.shape[:-1], cell.hidden_size)
    return input.shape[-1] == cell.input_size and all(
        isinstance(s, Tensor) and s.shape == shape and s.dtype == input.dtype for s in states
    )


def _weights(cell: nn.RNNCellBase) -> tuple[Tensor, ...]:
    if not cell.bias:
        return cell.weight_ih, cell.weight_hh
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


def _sequence(t: Tensor) -> Tensor:
    """(B, D) or (D,) to (B, 1, D)."""
    return t[:, None] if t.dim() == 2 else t[None, None]


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t[None]


class RNNCell(nn.RNNCell):
    """``torch.nn.RNNCell`` on the operator of `lmfast.nn.RNN`.

    ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu.

    Args:
        Those of ``torch.nn.RNNCell``; parameters, state_dict, call and errors are its own.

    Backends: those of `lmfast.ops.elman_rnn`.

    Example:
        >>> import lmfast, torch
        >>> lmfast.nn.RNNCell(3, 4)(torch.zeros(2, 3)).shape
        torch.Size([2, 4])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu") or not _is_step(
            self, input, () if hx is None else (hx,)
        ):
            return super().forward(input, hx)
        h = None if hx is None else _rows(hx)
        x, weights = _sequence(input), _weights(self)
        _, h = ops.elman_rnn(x, h, weights, nonlinearity=self.nonlinearity)
        return h if input.dim() == 2 else h[0]


class LSTMCell(nn.LSTMCell):
    """``torch.nn.LSTMCell`` on the operator of `lmfast.nn.LSTM`.

    ``c' = s(f) c + s(i) tanh(g)``, ``h' = s(o) tanh(c')``.

    Args:
        Those of ``torch.nn.LSTMCell``; parameters, state_dict, call and errors are its own.

    Backends: those of `lmfast.ops.lstm`.

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
        if len(states) not in (0, 2) or not _is_step(self, input, states):
            return super().forward(input, hx)
        given = None if hx is None else (_rows(hx[0]), _rows(hx[1]))
        _, (h, c) = ops.lstm(_sequence(input), given, _weights(self))
        return (h, c) if input.dim() == 2 else (h[0], c[0])


class GRUCell(nn.GRUCell):
    """``torch.nn.GRUCell`` on the operator of `lmfast.nn.GRU`, in torch's or the textbook's form.

    ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``, ``h' = (1 - z) n + z h``; the textbook's resets
    before the product, ``n = tanh(W_in x + b_in + W_hn (r h) + b_hn)``, and lets z take in the new,
    ``h' = (1 - z) h + z n``.

    Args:
        input_size, hidden_size, bias, device, dtype: as of ``torch.nn.GRUCell``, whose parameters,
            state_dict, call and errors these are.
        reset_after: torch's form, or the textbook's.

    Backends: those of `lmfast.ops.gru`.

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
        # torch.nn's forward only says what is wrong, if something is.
        if not _is_step(self, input, () if hx is None else (hx,)):
            return super().forward(input, hx)
        h = None if hx is None else _rows(hx)
        _, h = ops.gru(_sequence(input), h, _weights(self), reset_after=self.reset_after)
        return h if input.dim() == 2 else h[0]

    def extra_repr(self) -> str:
        form = "" if self.reset_after else ", reset_after=False"
        return super().extra_repr() + form
