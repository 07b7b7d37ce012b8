"""The two halves of a sequence-to-sequence model: recurrent encoder and attending decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmfast.models.base import check_ids, check_lengths
from lmfast.nn.padded import over_lengths
from lmfast.nn.rnn import GRU, LSTM, RNN
from lmfast.nn.source_attention import BahdanauAttention, LuongAttention, length_mask
from lmfast.nn.textbook_gru import TextbookGRU

CELLS: dict[str, Any] = {"rnn": RNN, "lstm": LSTM, "gru": GRU, "gru_textbook": TextbookGRU}
ATTENTIONS = ("bahdanau", "dot", "general", "scaled")


class Memory(NamedTuple):
    """What the decoder sees of a source: states (B, S, D), keys, and the mask (B, S) or None."""

    states: Tensor
    keys: Tensor
    mask: Tensor | None

    def repeated(self, times: int) -> Memory:
        """Every row `times` times, one after the other."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        states = self.states.repeat_interleave(times, 0)
        return Memory(states, self.keys.repeat_interleave(times, 0), mask)


class DecoderState(NamedTuple):
    """States (L, B, H), one tensor or two (LSTM), and the features fed back (B, H) or None."""

    hidden: tuple[Tensor, ...]
    fed: Tensor | None

    def reordered(self, index: Tensor) -> DecoderState:
        """The rows with these numbers."""
        fed = None if self.fed is None else self.fed.index_select(0, index)
        return DecoderState(tuple(h.index_select(1, index) for h in self.hidden), fed)


class Encoder(nn.Module):
    """Embedding and a stack of recurrent layers over right-padded sources.

    Args:
        vocab_size, emb_dim: of the embedding.
        hidden_dim: width H of each direction's states.
        cell: "rnn", "lstm", "gru" or "gru_textbook".
        num_layers, bidirectional, dropout: of the stack.
        pad_idx: id whose embedding is zero and never learnt, or None.

    Returns:
        Called with ids (B, S) and lengths (B,) or None: the top layer's states (B, S, D), D = H or
        2 H, zero behind a row's end, and a tuple of the final states (L, B, D), directions joined.

    Raises:
        ValueError: an unknown cell; a length that is not in 1..S.

    Backends: those of `lmfast.nn.RNN`, `LSTM` and `GRU`.

    Example:
        >>> import torch
        >>> encoder = Encoder(10, 4, 8, cell="gru")
        >>> states, (h,) = encoder(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 3]))
        >>> states.shape, h.shape
        (torch.Size([2, 5, 16]), torch.Size([1, 2, 16]))
    """

    def __init__(
        self,
        vocab_size: int,
        emb_dim: int,
        hidden_dim: int,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        pad_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        self.dropout = nn.Dropout(dropout)
        self.rnn = make_rnn(cell, emb_dim, hidden_dim, num_layers, dropout, bidirectional)
        self.directions = 2 if bidirectional else 1
        self.output_dim = self.directions * hidden_dim

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_ids(ids)
        x = self.dropout(self.embedding(ids))
        if lengths is not None:
            check_lengths(lengths, ids)
        if lengths is None or ids.shape[0] == 0:
            states, final = self.rnn(x)
        else:
            states, final = over_lengths(self.rnn, x, None, lengths)
        finals = final if isinstance(final, tuple) else (final,)
        return states, tuple(self._joined(h) for h in finals)

    def _joined(self, h: Tensor) -> Tensor:
        """(L directions, B, H) to (L, B, D)."""
        layers, batch, width = h.shape[0] // self.directions, h.shape[1], h.shape[2]
        split = h.view(layers, self.directions, batch, width)
        return split.transpose(1, 2).reshape(layers, batch, self.output_dim)


class Decoder(nn.Module):
    """Embedding, a stack of recurrent layers, and attention to the source.

        features = tanh(W [attention(h), h]),  or h without attention

    Args:
        vocab_size, emb_dim: of the embedding.
        hidden_dim: width H of states and features.
        source_dim: width D of the source's states.
        cell, num_layers, dropout, pad_idx: as of `Encoder`.
        attention: "bahdanau", "dot", "general", "scaled" or None.
        input_feeding: each step also sees the features of the one before, so that steps cannot be
            computed together.

    Backends: those of the recurrent layer and `lmfast.ops.additive_attention`.

    Source: Luong, Pham and Manning 2015, arXiv:1508.04025.
    """

    def __init__(
        self,
        vocab_size: int,
        emb_dim: int,
        hidden_dim: int,
        source_dim: int,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        dropout: float = 0.0,
        attention: str | None = "bahdanau",
        input_feeding: bool = False,
        pad_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        self.dropout = nn.Dropout(dropout)
        self.input_feeding = input_feeding
        self.hidden_dim = hidden_dim
        width = emb_dim + (hidden_dim if input_feeding else 0)
        self.rnn = make_rnn(cell, width, hidden_dim, num_layers, dropout, False)
        self.attention: BahdanauAttention | LuongAttention | None = None
        self.combine: nn.Linear | None = None
        if attention == "bahdanau":
            self.attention = BahdanauAttention(hidden_dim, source_dim, hidden_dim)
        elif attention is not None:
            self.attention = LuongAttention(hidden_dim, source_dim, attention)
        if attention is not None:
            self.combine = nn.Linear(source_dim + hidden_dim, hidden_dim)

    def remember(self, states: Tensor, lengths: Tensor | None) -> Memory:
        """Project a source once, for all steps that will look at it."""
        keys = states if self.attention is None else self.attention.project(states)
        mask = None if lengths is None else length_mask(lengths, states.shape[1])
        return Memory(states, keys, mask)

    def forward(
        self, ids: Tensor, memory: Memory, state: DecoderState
    ) -> tuple[Tensor, Tensor | None, DecoderState]:
        """Run the given tokens (B, T) through the decoder.

        Returns:
            Features (B, T, H), attention weights (B, T, S) or None, and the state after the last.
        """
        if not self.input_feeding:
            return self._run(self.dropout(self.embedding(ids)), memory, state)
        outputs, weights = [], []
        for t in range(ids.shape[1]):
            features, w, state = self._run(
                self.dropout(self.embedding(ids[:, t : t + 1])), memory, state
            )
            outputs.append(features)
            weights.append(w)
        attended = (
            None if self.attention is None else torch.cat([w for w in weights if w is not None], 1)
        )
        return torch.cat(outputs, 1), attended, state

    def _run(
        self, x: Tensor, memory: Memory, state: DecoderState
    ) -> tuple[Tensor, Tensor | None, DecoderState]:
        if self.input_feeding:
            fed = state.fed
            if fed is None:
                fed = x.new_zeros(x.shape[0], self.hidden_dim)
            x = torch.cat((x, fed[:, None]), -1)
        h, final = self.rnn(x, state.hidden if len(state.hidden) == 2 else state.hidden[0])
        weights = None
        if self.attention is not None and self.combine is not None:
            context, weights = self.attention(h, memory.states, mask=memory.mask, keys=memory.keys)
            h = torch.tanh(self.combine(torch.cat((context.to(h.dtype), h), -1)))
        fed = h[:, -1] if self.input_feeding else None
        hidden = final if isinstance(final, tuple) else (final,)
        return self.dropout(h), weights, DecoderState(hidden, fed)


def make_rnn(
    cell: str, width: int, hidden: int, layers: int, dropout: float, bidirectional: bool
) -> nn.RNNBase:
    """Return the batch-first layer named `cell`; ValueError for another name."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    between = dropout if layers > 1 else 0.0
    return CELLS[cell](
        width, hidden, layers, batch_first=True, dropout=between, bidirectional=bidirectional
    )
