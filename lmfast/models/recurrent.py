"""The recurrent language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmfast.models.base import LanguageModel, check_sizes
from lmfast.nn.elman import ElmanRNN
from lmfast.nn.embedding import Embedding


class RecurrentLanguageModel(LanguageModel):
    """An Elman network between an embedding and an output layer.

        h = ElmanRNN(embedding[ids]);   logits = h fc.weight^T + fc.bias

    Args:
        vocab_size: V.
        emb_dim: width E of embedding and states.
        num_layers: number L of recurrent layers.
        pad_idx: id whose embedding is zero and never learnt, or None.

    State-dict names: `embedding.weight`, `rnn.rnn_units.{l}.Uh|Wh|b`, `fc.weight` (V, E) and
    `fc.bias`.

    Raises:
        ValueError: a size is not positive or `pad_idx` is no id.

    Backends: `lmfast.ops.linear_cross_entropy` for the loss, PyTorch for the recurrence.

    Source: Mikolov et al. 2010, "Recurrent neural network based language model".

    Example:
        >>> import torch
        >>> model = RecurrentLanguageModel(50, 16, 2, 0)
        >>> logits, state = model.step(torch.tensor([[7]]), model.new_state(1))
        >>> logits.shape, state.shape
        (torch.Size([1, 50]), torch.Size([2, 1, 16]))
    """

    kind = "recurrent"

    def __init__(self, vocab_size: int, emb_dim: int, num_layers: int, pad_idx: int | None) -> None:
        super().__init__()
        check_sizes(vocab_size, emb_dim, pad_idx)
        self.vocab_size = vocab_size
        self.emb_dim = emb_dim
        self.pad_idx = pad_idx
        self.options = {
            "vocab_size": vocab_size,
            "emb_dim": emb_dim,
            "num_layers": num_layers,
            "pad_idx": pad_idx,
        }
        self.embedding = Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        self.rnn = ElmanRNN(emb_dim, num_layers)
        self.fc = nn.Linear(emb_dim, vocab_size)
        # The embedding keeps its normal(0, 1): with the 0.02 of the decoder, whose norms rescale
        # it, the states barely depend on the input and 100 steps stay at the unigram loss
        # (6.77 on 2 MB of text, 6.05 with 1).
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.embedding.clear_padding()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the output layer's weight (V, E) and bias (V)."""
        return self.fc.weight, self.fc.bias

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the top layer's states (B, T, E)."""
        return self.rnn(self.embedding(ids))

    def new_state(self, batch: int, capacity: int | None = None) -> Tensor:
        """Return zero states (L, B, E); they have one size whatever the length."""
        return self.fc.weight.new_zeros(self.rnn.num_layers, batch, self.emb_dim)

    def advance(
        self, ids: Tensor, state: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next tokens' states (B, T, E) and the ones to continue from (L, B, E)."""
        return self.rnn.forward_with_state(self.embedding(ids), state, lengths)

    @torch.no_grad()
    def reset_parameters_legacy(self) -> None:
        """Initialise as older textbook code does: Xavier embedding, recurrent biases in [0, 1)."""
        nn.init.xavier_uniform_(self.embedding.weight)
        for unit in self.rnn.units():
            nn.init.uniform_(unit.b)
        self.embedding.clear_padding()
