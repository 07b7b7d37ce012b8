"""Attention of a decoder to a source sequence: additive (Bahdanau) and multiplicative (Luong)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.hooks import has_hooks
from lmfast.nn.sizes import check_sizes

SCORES = ("dot", "general", "scaled")


def length_mask(lengths: Tensor, steps: int) -> Tensor:
    """Return (B, steps) bool, True at the real steps of right-padded rows.

    Args:
        lengths: (B,) integers.
        steps: width of the batch.

    Example:
        >>> import torch
        >>> length_mask(torch.tensor([1, 3]), 3)
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


class BahdanauAttention(nn.Module):
    """Additive attention over a source sequence.

        score_s = v . tanh(W_query q + W_key source_s + b);  context = softmax(score) source

    Args:
        query_dim: width Q of the queries.
        source_dim: width D of the source's states.
        attention_dim: width A of the scores' hidden layer.

    Returns:
        Called with query (B, Q) or (B, T, Q) and source (B, S, D): the context, (B, D) or
        (B, T, D), and the weights, (B, S) or (B, T, S). `mask` (B, S) bool is True where the source
        may be attended to; `keys` is what `project` returned, given by whoever takes many steps.

    Parameters: `query.weight` (A, Q), `key.weight` (A, D), `key.bias` (A) with both biases of the
    formula, `v` (A).

    Raises:
        ValueError: a size is not positive; what `lmfast.ops.additive_attention` raises.

    Backends: those of `lmfast.ops.additive_attention`.

    Source: Bahdanau, Cho and Bengio 2015, arXiv:1409.0473.

    Example:
        >>> import torch
        >>> attention = BahdanauAttention(4, 3, 8)
        >>> context, weights = attention(torch.zeros(2, 4), torch.zeros(2, 5, 3))
        >>> context.shape, weights.shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    def __init__(self, query_dim: int, source_dim: int, attention_dim: int) -> None:
        super().__init__()
        check_sizes(query_dim=query_dim, source_dim=source_dim, attention_dim=attention_dim)
        self.query = nn.Linear(query_dim, attention_dim, bias=False)
        self.key = nn.Linear(source_dim, attention_dim)
        self.v = nn.Parameter(torch.empty(attention_dim))
        nn.init.uniform_(self.v, -(attention_dim**-0.5), attention_dim**-0.5)

    def project(self, source: Tensor) -> Tensor:
        """Return the keys (B, S, A) of a source (B, S, D), for all steps that look at it."""
        return self.key(source)

    def forward(
        self,
        query: Tensor,
        source: Tensor,
        *,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        keys = self.project(source) if keys is None else keys
        dtype = keys.dtype  # autocast narrows the keys; the rest follows them
        query_only_multiplies = type(self.query) is nn.Linear and not has_hooks(self.query)
        if query_only_multiplies and "forward" not in vars(self.query):
            w_query = self.query.weight.to(dtype)
        else:  # one that somebody watches, or that adds something, such as a low-rank update
            query = self.query(query)
            w_query = torch.eye(query.shape[-1], dtype=dtype, device=query.device)
        return ops.additive_attention(
            query.to(dtype), keys, source.to(dtype), w_query, self.v.to(dtype), mask=mask
        )


class LuongAttention(nn.Module):
    """Multiplicative attention over a source sequence.

        score_s = q . source_s            "dot"
        score_s = q . W source_s          "general"
        score_s = q . source_s / sqrt(Q)  "scaled"
        context = softmax(score) source

    Args:
        query_dim: width Q of the queries.
        source_dim: width D of the source's states; Q unless score is "general".
        score: one of the above.

    Returns:
        Called as `BahdanauAttention`. With `need_weights=False` the second result is None and the
        weights are never stored.

    Parameters: `weight` (Q, D) with "general", none otherwise.

    Raises:
        ValueError: a size is not positive, the widths differ, an unknown score.

    Backends: `lmfast.ops.attention` without weights, PyTorch with them.

    Source: Luong, Pham and Manning 2015, arXiv:1508.04025.

    Example:
        >>> import torch
        >>> attention = LuongAttention(4, 3, "general")
        >>> context, weights = attention(torch.zeros(2, 6, 4), torch.zeros(2, 5, 3))
        >>> context.shape, weights.shape
        (torch.Size([2, 6, 3]), torch.Size([2, 6, 5]))
    """

    weight: nn.Parameter | None

    def __init__(self, query_dim: int, source_dim: int, score: str = "general") -> None:
        super().__init__()
        check_sizes(query_dim=query_dim, source_dim=source_dim)
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if score != "general" and query_dim != source_dim:
            raise ValueError(
                f"source_dim must be query_dim {query_dim} with score {score!r}, got {source_dim}"
            )
        self.score = score
        self.scale = query_dim**-0.5 if score == "scaled" else 1.0
        weight = nn.Parameter(torch.empty(query_dim, source_dim)) if score == "general" else None
        self.register_parameter("weight", weight)
        if weight is not None:
            nn.init.xavier_uniform_(weight)

    def project(self, source: Tensor) -> Tensor:
        """Return the keys of a source: itself, since W is applied to the queries."""
        return source

    def forward(
        self,
        query: Tensor,
        source: Tensor,
        *,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        keys = source if keys is None else keys
        width = source.shape[-1] if self.weight is None else self.weight.shape[0]
        if query.dim() not in (2, 3) or query.shape[-1] != width:
            raise ValueError(
                f"query must be (B, {width}) or (B, T, {width}), got {tuple(query.shape)}"
            )
        if mask is not None and mask.shape != source.shape[:2]:
            raise ValueError(f"mask must be {tuple(source.shape[:2])}, got {tuple(mask.shape)}")
        q = query if query.dim() == 3 else query[:, None]
        if self.weight is not None:
            q = q @ self.weight  # [B, T, D]
        if need_weights:
            context, weights = self._with_weights(q, source, keys, mask)
        else:
            visible = None if mask is None else mask[:, None, None]
            heads = (t[:, None].to(source.dtype) for t in (q, keys, source))
            context = ops.attention(*heads, causal=False, mask=visible, scale=self.scale)[:, 0]
            weights = None
        if query.dim() == 3:
            return context, weights
        return context[:, 0], None if weights is None else weights[:, 0]

    def _with_weights(
        self, q: Tensor, source: Tensor, keys: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = q @ keys.transpose(1, 2) * self.scale  # [B, T, S]
        if mask is None:
            weights = scores.softmax(-1)
        else:
            hidden = ~mask[:, None]
            empty = hidden.all(-1, keepdim=True)
            weights = scores.masked_fill(hidden & ~empty, float("-inf")).softmax(-1)
            weights = weights.masked_fill(hidden, 0)
        return weights @ source.to(weights.dtype), weights

    def extra_repr(self) -> str:
        return f"score={self.score!r}"
