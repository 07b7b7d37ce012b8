"""Stacks of recurrent layers of any cell with one state tensor, for language models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmfast.nn.elman import ElmanRNN
from lmfast.nn.min_rnn import MinGRU, MinLSTM
from lmfast.nn.padded import over_lengths
from lmfast.nn.rnn import GRU, LSTM, RNN
from lmfast.nn.textbook_gru import TextbookGRU

CELLS = ("elman", "rnn", "lstm", "gru", "gru_textbook", "min_gru", "min_lstm")


class GatedStack(nn.Module):
    """L layers of torch.nn's kind over (B, T, E), their states in one tensor.

    Args:
        cell: "rnn", "lstm", "gru" or "gru_textbook".
        dim: width E of input and states.
        num_layers: L.
        dropout: between layers.

    Parameters: `layers.weight_ih_l{l}` and so on, as of torch.nn's.

    Backends: those of `lmfast.nn.RNN`, `LSTM`, `GRU` and `TextbookGRU`.

    Example:
        >>> import torch
        >>> stack = GatedStack("lstm", 4, 2)
        >>> y, state = stack.forward_with_state(torch.zeros(3, 5, 4))
        >>> y.shape, state.shape
        (torch.Size([3, 5, 4]), torch.Size([4, 3, 4]))
    """

    def __init__(self, cell: str, dim: int, num_layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        kinds = {"rnn": RNN, "lstm": LSTM, "gru": GRU, "gru_textbook": TextbookGRU}
        between = dropout if num_layers > 1 else 0.0
        self.layers = kinds[cell](dim, dim, num_layers, batch_first=True, dropout=between)
        self.state_rows = num_layers * (2 if cell == "lstm" else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]

    def forward_with_state(
        self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the stack.

        Args:
            x: (B, T, E).
            state: (L, B, E) before the first step, (2 L, B, E) for an LSTM, its cell states last;
                None for zeros.
            lengths: (B,) real steps of each right-padded row, at least 1; None = T.

        Returns:
            The top layer's states (B, T, E), zero behind a row's end, and the state to go on from.
        """
        given: Tensor | tuple[Tensor, Tensor] | None = state
        if state is not None and self.layers.mode == "LSTM":
            h, c = state.chunk(2)
            given = (h.contiguous(), c.contiguous())
        if lengths is None:
            y, final = self.layers(x, given)
        else:
            y, final = over_lengths(self.layers, x, given, lengths)
        return y, torch.cat(final) if isinstance(final, tuple) else final


class MinStack(nn.Module):
    """L layers of minGRU or minLSTM over (B, T, E), each added to its input.

        x = x + MinRNN(x)

    Without the sum a stack of gates that see only the layer below learns slowly.

    Args:
        cell: "min_gru" or "min_lstm".
        dim, num_layers: E and L.

    Backends: those of `lmfast.ops.linear_recurrence`.

    Example:
        >>> import torch
        >>> y, state = MinStack("min_gru", 4, 2).forward_with_state(torch.zeros(3, 5, 4))
        >>> y.shape, state.shape
        (torch.Size([3, 5, 4]), torch.Size([2, 3, 4]))
    """

    def __init__(self, cell: str, dim: int, num_layers: int) -> None:
        super().__init__()
        kind = {"min_gru": MinGRU, "min_lstm": MinLSTM}[cell]
        self.layers = nn.ModuleList(kind(dim, dim) for _ in range(num_layers))
        self.state_rows = num_layers

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(x)[0]

    def forward_with_state(
        self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the stack; arguments and results as of `GatedStack`."""
        finals = []
        for index, layer in enumerate(self.layers):
            y, final = layer(x, None if state is None else state[index])
            if lengths is not None:
                # Rows do not look ahead, so what stands at a row's end is its final state.
                final = y[torch.arange(len(y), device=y.device), lengths - 1]
            x = x + y
            finals.append(final)
        if lengths is not None:
            real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = x.masked_fill(~real[..., None], 0)
        return x, torch.stack(finals)


def make_stack(
    cell: str, dim: int, num_layers: int, dropout: float = 0.0
) -> ElmanRNN | GatedStack | MinStack:
    """Return the stack named `cell`, one of `CELLS`; ValueError for another name."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if cell in ("elman", "min_gru", "min_lstm") and dropout:
        raise ValueError(f"dropout must be 0 with cell {cell!r}, got {dropout}")
    if cell == "elman":
        return ElmanRNN(dim, num_layers)
    if cell.startswith("min"):
        return MinStack(cell, dim, num_layers)
    return GatedStack(cell, dim, num_layers, dropout)
