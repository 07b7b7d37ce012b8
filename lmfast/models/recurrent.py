"""The recurrent language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfast.models.base import LanguageModel, check_ids, check_sizes, keep_row_fixed
from lmfast.models.output import loss_of, only_multiplies, output_layer
from lmfast.nn import sizes
from lmfast.nn.elman import ElmanRNN
from lmfast.nn.embedding import Embedding
from lmfast.nn.stack import make_stack


class RecurrentLanguageModel(LanguageModel):
    """A recurrent network between an embedding and an output layer.

        h = network(embedding[ids]);   logits = h fc.weight^T + fc.bias

    Args:
        vocab_size: V.
        emb_dim: width E of embedding and states.
        num_layers: number L of recurrent layers.
        pad_idx: id whose embedding is zero and never learnt, or None.
        cell: "elman", "rnn", "lstm", "gru", "gru_textbook", "min_gru" or "min_lstm".
        tie_weights: use the embedding as output matrix; the padding row then takes no part in
            learning and its logit is its bias.
        dropout: between layers, of the cells that torch.nn has too.

    State-dict names: `embedding.weight`, `rnn.rnn_units.{l}.Uh|Wh|b` (elman), `rnn.layers.*`
    (others), `fc.bias`, and `fc.weight` (V, E) unless tied.

    Raises:
        ValueError: a size is not positive, `pad_idx` is no id, an unknown cell.

    Backends: those of the recurrent layers, and of `lmfast.ops.linear_cross_entropy` for the loss.

    Source: Mikolov et al. 2010, "Recurrent neural network based language model".

    Example:
        >>> import torch
        >>> model = RecurrentLanguageModel(50, 16, 2, 0, cell="gru")
        >>> logits, state = model.step(torch.tensor([[7]]), model.new_state(1))
        >>> logits.shape, state.shape
        (torch.Size([1, 50]), torch.Size([2, 1, 16]))
    """

    kind = "recurrent"

    def __init__(
        self,
        vocab_size: int,
        emb_dim: int,
        num_layers: int,
        pad_idx: int | None,
        *,
        cell: str = "elman",
        tie_weights: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size, emb_dim, pad_idx)
        sizes.check_sizes(num_layers=num_layers)
        self.vocab_size = vocab_size
        self.emb_dim = emb_dim
        self.pad_idx = pad_idx
        self.options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "emb_dim": emb_dim,
            "num_layers": num_layers,
            "pad_idx": pad_idx,
            "cell": cell,
            "tie_weights": tie_weights,
            "dropout": dropout,
        }
        self.embedding = Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        self.rnn = make_stack(cell, emb_dim, num_layers, dropout)
        self.fc = nn.Linear(emb_dim, vocab_size)
        self.tie_weights = tie_weights
        if tie_weights:
            self.fc.register_parameter("weight", None)
            # Logits of unit variance: the states are of order one in each of E directions.
            nn.init.normal_(self.embedding.weight, std=emb_dim**-0.5)
        else:
            # The embedding keeps its normal(0, 1): with the 0.02 of the decoder, whose norms
            # rescale it, the states barely depend on the input and 100 steps stay at the unigram
            # loss (6.77 on 2 MB of text, 6.05 with 1).
            nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.embedding.clear_padding()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the output layer's weight (V, E) and bias (V)."""
        if not self.tie_weights:
            return output_layer(self.fc)
        self.embedding.clear_padding()
        return keep_row_fixed(self.embedding.weight, self.pad_idx), self.fc.bias

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the top layer's states (B, T, E)."""
        check_ids(ids)
        return self.rnn(self.embedding(ids))

    def new_state(self, batch: int, capacity: int | None = None) -> Tensor:
        """Return zero states (L, B, E), 2 L for an LSTM; of one size whatever the length."""
        rows = self.rnn.num_layers if isinstance(self.rnn, ElmanRNN) else self.rnn.state_rows
        return self.fc.bias.new_zeros(rows, batch, self.emb_dim)

    def advance(
        self, ids: Tensor, state: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next tokens' states (B, T, E) and the ones to continue from (L, B, E)."""
        return self.rnn.forward_with_state(self.embedding(ids), state, lengths)

    def loss(self, ids: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy of the targets; logits are made only where `fc` must be called."""
        if self._only_weights() or targets.shape != ids.shape:
            return super().loss(ids, targets, ignore_index=ignore_index)
        return loss_of(self.fc, self.hidden(ids), targets, ignore_index)

    def _logits(self, features: Tensor) -> Tensor:
        return super()._logits(features) if self._only_weights() else self.fc(features)

    def _only_weights(self) -> bool:
        # With a shared matrix there is no call of `fc` that anything could be beside.
        return self.tie_weights or only_multiplies(self.fc)

    @torch.no_grad()
    def reset_parameters_legacy(self) -> None:
        """Initialise as older textbook code does: Xavier embedding, recurrent biases in [0, 1).

        Raises:
            ValueError: the cell is not "elman".
        """
        if not isinstance(self.rnn, ElmanRNN):
            raise ValueError(f"cell must be 'elman', got {self.options['cell']!r}")
        nn.init.xavier_uniform_(self.embedding.weight)
        for unit in self.rnn.units():
            nn.init.uniform_(unit.b)
        self.embedding.clear_padding()
