"""Stacks of torch.nn's form over right-padded rows, each of a length of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lmfast import ops
from lmfast.nn.hooks import has_hooks
from lmfast.ops._recurrent_lengths import are_hidden


def _layer_op(rnn: nn.RNNBase) -> Callable[..., Any]:
    if rnn.mode == "LSTM":
        return ops.lstm
    if rnn.mode == "GRU":
        return partial(ops.gru, reset_after=getattr(rnn, "reset_after", True))
    return partial(ops.elman_rnn, nonlinearity=rnn.mode[4:].lower())


def layers_of(rnn: nn.RNNBase, x: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
    """All layers of ``rnn``, each direction of each by one call of an operator.

    Args:
        rnn: an `RNN`, `LSTM`, `GRU` or `TextbookGRU` without projections.
        x: (B, T, D).
        hx: states (L directions, B, H), two of them for an LSTM; None for zeros.
        lengths: (B,) or None.

    Returns:
        y (B, T, H directions) of the top layer, and the final states in the form of hx.
    """
    directions = 2 if rnn.bidirectional else 1
    dropout = rnn.dropout if rnn.training else 0.0
    lstm = rnn.mode == "LSTM"
    layer_op = _layer_op(rnn)
    finals = []
    for layer in range(rnn.num_layers):
        if layer and dropout:
            x = F.dropout(x, dropout)
        outputs = []
        for index in range(layer * directions, (layer + 1) * directions):
            state: Any = None
            if hx is not None:
                state = tuple(s[index] for s in hx) if lstm else hx[index]
            weights = tuple(rnn.all_weights[index])
            reverse = index % directions == 1
            y, final = layer_op(x, state, weights, lengths=lengths, reverse=reverse)
            outputs.append(y)
            finals.append(final if lstm else (final,))
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    stacked = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    return x, stacked if lstm else stacked[0]


def over_lengths(rnn: nn.RNNBase, x: Tensor, hx: Any, lengths: Tensor) -> tuple[Tensor, Any]:
    """Call a batch-first layer on right-padded rows.

    All layers see the rows packed; in a graph, where how many there are must not depend on numbers,
    each layer takes the lengths.

    Args:
        rnn: an `RNN`, `LSTM`, `GRU` or `TextbookGRU`, batch-first and without projections.
        x: (B, T, D), B at least 1.
        hx: as of `layers_of`.
        lengths: (B,) real steps of each row, at least 1.

    Returns:
        y (B, T, H directions), zero behind a row's end, and the final states in the form of hx.
    """
    if are_hidden(x) and not has_hooks(rnn):
        return layers_of(rnn, x, hx, lengths)
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    packed, final = rnn(packed, hx)
    return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0], final
