"""A sequence tagger: one label per token, from both sides of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmfast.models.encoder_decoder import Encoder
from lmfast.models.output import loss_of


class Tagger(nn.Module):
    """Embedding, a bidirectional recurrent stack over the real tokens, and a linear layer.

        logits_t = W [forward h_t, backward h_t] + b

    Args:
        vocab_size, num_tags: numbers of ids and of labels.
        emb_dim, hidden_dim: widths E of embeddings and H of each direction's states.
        cell: "rnn", "lstm", "gru" or "gru_textbook".
        num_layers, dropout: of the stack; dropout also acts on embeddings and features.
        pad_idx: id whose embedding is zero and never learnt, or None.

    Raises:
        ValueError: an unknown cell; called with lengths that are not in 1..T.

    Backends: those of the recurrent layer and `lmfast.ops.linear_cross_entropy`.

    Source: Huang, Xu and Yu 2015, arXiv:1508.01991 (without the CRF).

    Example:
        >>> import torch
        >>> tagger = Tagger(20, 9, emb_dim=4, hidden_dim=8)
        >>> tagger(torch.randint(1, 20, (2, 5)), torch.tensor([5, 3])).shape
        torch.Size([2, 5, 9])
    """

    def __init__(
        self,
        vocab_size: int,
        num_tags: int,
        *,
        emb_dim: int = 300,
        hidden_dim: int = 256,
        cell: str = "lstm",
        num_layers: int = 2,
        dropout: float = 0.0,
        pad_idx: int | None = 0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            vocab_size, emb_dim, hidden_dim, cell=cell, num_layers=num_layers, dropout=dropout,
            pad_idx=pad_idx,
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * hidden_dim, num_tags)

    def hidden(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the features (B, T, 2 H) of ids (B, T), zero behind each row's length."""
        return self.dropout(self.encoder(ids, lengths)[0])

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits (B, T, tags) for ids (B, T) of which row i has `lengths[i]` tokens."""
        return self.fc(self.hidden(ids, lengths))

    def loss(
        self, ids: Tensor, tags: Tensor, lengths: Tensor | None = None, *, ignore_index: int = -100
    ) -> Tensor:
        """Mean cross-entropy of the tags (B, T) of real tokens.

        Args:
            ids, tags: (B, T) int64.
            lengths: (B,) real tokens of each right-padded row, at least 1; None = T. Tags behind
                them do not count, whatever they are.
            ignore_index: tags with this value do not count either.

        Returns:
            A scalar.
        """
        if tags.shape != ids.shape:
            raise ValueError(
                f"tags must have the shape of ids {tuple(ids.shape)}, got {tuple(tags.shape)}"
            )
        features = self.hidden(ids, lengths)
        if lengths is not None:
            behind = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
            tags = tags.masked_fill(behind, ignore_index)
        return loss_of(self.fc, features, tags, ignore_index)

    @torch.no_grad()
    def predict(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the likeliest tag (B, T) of every token; behind a row's end it means nothing."""
        return self(ids, lengths).argmax(-1)
