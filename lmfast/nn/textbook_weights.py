"""Recurrent weights between textbooks, these layers and torch.nn.

A textbook has one matrix per gate on the joined vector [h_{t-1}, x_t] (or two square matrices for
an Elman unit) and one bias; torch.nn stacks the gates, splits state and input, and has two biases
whose sum acts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmfast.nn.elman import ElmanRNN

# Textbook's names in torch.nn's order of rows.
_LSTM_GATES = ("i", "f", "c", "o")
_GRU_GATES = ("r", "z", "h")


def lstm_from_textbook(weights: Mapping[str, Tensor], suffix: str = "_l0") -> dict[str, Tensor]:
    """Return the parameters of `torch.nn.LSTM` and `lmfast.nn.LSTM` from a textbook's.

        f, i, o = s(W_{f,i,o} [h, x] + b_{f,i,o});  g = tanh(W_c [h, x] + b_c)

    Args:
        weights: `W_i`, `W_f`, `W_c`, `W_o`, each (H, H + D), and `b_i`, `b_f`, `b_c`, `b_o`, each
            (H,); biases may be missing.
        suffix: of the names, "_l0" for the first layer, "" for an LSTMCell.

    Returns:
        `weight_ih`, `weight_hh` and, with biases, `bias_ih` and a zero `bias_hh`.

    Raises:
        ValueError: a matrix is missing or has another shape than the first one.

    Example:
        >>> import lmfast, torch
        >>> gates = {f"W_{g}": torch.zeros(2, 5) for g in "ifco"}
        >>> lstm_from_textbook(gates, "")["weight_ih"].shape
        torch.Size([8, 3])
    """
    return _stacked(weights, _LSTM_GATES, suffix)


def lstm_to_textbook(state: Mapping[str, Tensor], suffix: str = "_l0") -> dict[str, Tensor]:
    """Return `W_i`, ..., `b_o` from an LSTM's state_dict; the inverse of `lstm_from_textbook`.

    Args:
        state: a state_dict with `weight_ih` and so on, with the suffix.
        suffix: of the layer wanted.

    Returns:
        One matrix (H, H + D) per gate and, where there are biases, one bias per gate.

    Example:
        >>> import lmfast, torch
        >>> lstm_to_textbook(lmfast.nn.LSTM(3, 2).state_dict())["W_f"].shape
        torch.Size([2, 5])
    """
    return _split(state, _LSTM_GATES, suffix)


def gru_from_textbook(weights: Mapping[str, Tensor], suffix: str = "_l0") -> dict[str, Tensor]:
    """Return the parameters of `lmfast.nn.TextbookGRU` or of `GRUCell(reset_after=False)`.

    No parameters make torch.nn.GRU, which resets after the product, compute the same.

    Args:
        weights: `W_r`, `W_z`, `W_h`, each (H, H + D), the last one on [r h, x], and `b_r`, `b_z`,
            `b_h`, each (H,); biases may be missing. z takes in the new: h' = (1 - z) h + z n.
        suffix: of the names, "_l0" for the first layer, "" for a GRUCell.

    Returns:
        As `lstm_from_textbook`.

    Raises:
        ValueError: a matrix is missing or has another shape than the first one.

    Example:
        >>> import lmfast, torch
        >>> gru = lmfast.nn.TextbookGRU(3, 2)
        >>> gates = {f"W_{g}": torch.zeros(2, 5) for g in "rzh"}
        >>> gates |= {f"b_{g}": torch.zeros(2) for g in "rzh"}
        >>> gru.load_state_dict(gru_from_textbook(gates))
        <All keys matched successfully>
    """
    return _stacked(weights, _GRU_GATES, suffix)


def gru_to_textbook(state: Mapping[str, Tensor], suffix: str = "_l0") -> dict[str, Tensor]:
    """Return `W_r`, ..., `b_h` from a TextbookGRU's state_dict; see `gru_from_textbook`."""
    return _split(state, _GRU_GATES, suffix)


def elman_from_torch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict of `lmfast.nn.ElmanRNN` from that of a torch.nn.RNN of tanh units.

    Args:
        state: of a `torch.nn.RNN` with input_size = hidden_size, one direction.

    Returns:
        `rnn_units.{l}.Wh`, `.Uh` and `.b`; the two biases are added up.

    Raises:
        ValueError: the layers are not square or go both ways.

    Example:
        >>> import lmfast, torch
        >>> elman = lmfast.nn.ElmanRNN(3, 2)
        >>> elman.load_state_dict(elman_from_torch(torch.nn.RNN(3, 3, 2).state_dict()))
        <All keys matched successfully>
    """
    found: dict[str, Tensor] = {}
    layers = sum(name.startswith("weight_ih_l") for name in state)
    if any(name.endswith("_reverse") for name in state):
        raise ValueError("state must be of one direction, got a bidirectional network's")
    for layer in range(layers):
        w_ih, w_hh = state[f"weight_ih_l{layer}"], state[f"weight_hh_l{layer}"]
        if w_ih.shape != w_hh.shape:
            raise ValueError(
                f"input_size must be hidden_size {w_hh.shape[1]} for an ElmanRNN, got "
                f"{w_ih.shape[1]} in layer {layer}"
            )
        bias = state.get(f"bias_ih_l{layer}", w_hh.new_zeros(w_hh.shape[0]))
        found[f"rnn_units.{layer}.Uh"] = w_hh.t().contiguous()
        found[f"rnn_units.{layer}.Wh"] = w_ih.t().contiguous()
        found[f"rnn_units.{layer}.b"] = bias + state.get(f"bias_hh_l{layer}", 0)
    return found


def elman_to_torch(rnn: ElmanRNN) -> dict[str, Tensor]:
    """Return the state_dict of the `torch.nn.RNN` (or `lmfast.nn.RNN`) equal to an ElmanRNN.

    Args:
        rnn: the stack.

    Returns:
        `weight_ih_l{l}`, `weight_hh_l{l}`, `bias_ih_l{l}`, and a zero `bias_hh_l{l}`.

    Example:
        >>> import lmfast, torch
        >>> rnn = torch.nn.RNN(3, 3, 2)
        >>> rnn.load_state_dict(elman_to_torch(lmfast.nn.ElmanRNN(3, 2)))
        <All keys matched successfully>
    """
    found: dict[str, Tensor] = {}
    for layer, unit in enumerate(rnn.units()):
        found[f"weight_ih_l{layer}"] = unit.Wh.detach().t().contiguous()
        found[f"weight_hh_l{layer}"] = unit.Uh.detach().t().contiguous()
        found[f"bias_ih_l{layer}"] = unit.b.detach().clone()
        found[f"bias_hh_l{layer}"] = torch.zeros_like(unit.b)
    return found


def _stacked(
    weights: Mapping[str, Tensor], gates: tuple[str, ...], suffix: str
) -> dict[str, Tensor]:
    missing = [f"W_{g}" for g in gates if f"W_{g}" not in weights]
    if missing:
        raise ValueError(f"weights must have {', '.join(missing)}, got {', '.join(weights)}")
    hidden, joined = weights[f"W_{gates[0]}"].shape
    for g in gates:
        if weights[f"W_{g}"].shape != (hidden, joined):
            raise ValueError(
                f"W_{g} must have shape {(hidden, joined)}, got {tuple(weights[f'W_{g}'].shape)}"
            )
    matrix = torch.cat([weights[f"W_{g}"] for g in gates])  # [G H, H + D]
    found = {
        f"weight_ih{suffix}": matrix[:, hidden:].contiguous(),
        f"weight_hh{suffix}": matrix[:, :hidden].contiguous(),
    }
    biases = [weights.get(f"b_{g}") for g in gates]
    if any(b is not None for b in biases):
        zero = matrix.new_zeros(hidden)
        bias = torch.cat([zero if b is None else b for b in biases])
        found |= {f"bias_ih{suffix}": bias, f"bias_hh{suffix}": torch.zeros_like(bias)}
    return found


def _split(state: Mapping[str, Tensor], gates: tuple[str, ...], suffix: str) -> dict[str, Tensor]:
    w_ih, w_hh = state[f"weight_ih{suffix}"], state[f"weight_hh{suffix}"]
    matrix = torch.cat((w_hh, w_ih), 1)
    if matrix.shape[0] != len(gates) * w_hh.shape[1]:
        raise ValueError(
            f"weight_hh{suffix} must have {len(gates)} rows per column, got {tuple(w_hh.shape)}"
        )
    found = {f"W_{g}": part for g, part in zip(gates, matrix.chunk(len(gates)))}
    if f"bias_ih{suffix}" in state:
        bias = state[f"bias_ih{suffix}"] + state[f"bias_hh{suffix}"]
        found |= {f"b_{g}": part for g, part in zip(gates, bias.chunk(len(gates)))}
    return found
