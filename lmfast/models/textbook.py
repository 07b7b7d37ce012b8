"""The two language models as a textbook teaches them: the baseline that all speeds refer to.

Plain PyTorch, one line per formula: a loop over heads, a loop over time steps, the mask and the
attention weights written out, all logits kept, no cache when generating. Nothing here is slowed
down on purpose and nothing is optimised. Parameters have the names and shapes of the models in
`lmfast.models`, so a state dict goes from one to the other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextbookRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale."""

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.eps) * self.scale


def rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions 0..T-1 on adjacent feature pairs of x (B, T, D)."""
    steps, dim = x.shape[1:]
    positions = torch.arange(steps, dtype=x.dtype, device=x.device)
    pairs = torch.arange(0, dim, 2, dtype=x.dtype, device=x.device)
    angles = positions[:, None] * base ** (-pairs / dim)  # (T, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    first = even * angles.cos() - odd * angles.sin()
    second = even * angles.sin() + odd * angles.cos()
    return torch.stack((first, second), dim=-1).flatten(-2)


class TextbookHead(nn.Module):
    """softmax(q k^T / sqrt(D) + mask) v for one head."""

    def __init__(self, emb_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.W_Q = nn.Parameter(torch.empty(emb_dim, head_dim))
        self.W_K = nn.Parameter(torch.empty(emb_dim, head_dim))
        self.W_V = nn.Parameter(torch.empty(emb_dim, head_dim))
        for weight in (self.W_Q, self.W_K, self.W_V):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = rotate(x @ self.W_Q)
        k = rotate(x @ self.W_K)
        v = x @ self.W_V
        scores = q @ k.transpose(1, 2) / math.sqrt(self.head_dim)  # (B, T, T)
        scores = scores.masked_fill(mask == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ v


class TextbookAttention(nn.Module):
    """All heads one after the other, joined and mixed by W_O."""

    def __init__(self, emb_dim: int, num_heads: int) -> None:
        super().__init__()
        head_dim = emb_dim // num_heads
        if head_dim * num_heads != emb_dim or head_dim % 2:
            raise ValueError(
                f"emb_dim / num_heads must be even, for rotary pairs, got {emb_dim} / {num_heads}"
            )
        self.heads = nn.ModuleList(TextbookHead(emb_dim, head_dim) for _ in range(num_heads))
        self.W_O = nn.Parameter(torch.empty(num_heads * head_dim, emb_dim))
        nn.init.xavier_uniform_(self.W_O)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        outputs = [head(x, mask) for head in self.heads]
        return torch.cat(outputs, dim=-1) @ self.W_O


class TextbookMLP(nn.Module):
    """relu(x W_1 + B_1) W_2 + B_2."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.W_1 = nn.Parameter(torch.empty(emb_dim, 4 * emb_dim))
        self.B_1 = nn.Parameter(torch.zeros(4 * emb_dim))
        self.W_2 = nn.Parameter(torch.empty(4 * emb_dim, emb_dim))
        self.B_2 = nn.Parameter(torch.zeros(emb_dim))
        nn.init.xavier_uniform_(self.W_1)
        nn.init.xavier_uniform_(self.W_2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.W_1 + self.B_1) @ self.W_2 + self.B_2


class TextbookBlock(nn.Module):
    """Attention and feed-forward layer with norms before and residual connections around them."""

    def __init__(self, emb_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = TextbookRMSNorm(emb_dim)
        self.attn = TextbookAttention(emb_dim, num_heads)
        self.norm2 = TextbookRMSNorm(emb_dim)
        self.mlp = TextbookMLP(emb_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextbookDecoder(nn.Module):
    """Embedding, blocks, output matrix: ids (B, T) to logits (B, T, V)."""

    def __init__(
        self, vocab_size: int, emb_dim: int, num_heads: int, num_blocks: int, pad_idx: int | None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        self.layers = nn.ModuleList(TextbookBlock(emb_dim, num_heads) for _ in range(num_blocks))
        self.output = nn.Parameter(torch.empty(emb_dim, vocab_size))
        nn.init.xavier_uniform_(self.output)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        steps = ids.shape[1]
        mask = torch.tril(torch.ones(steps, steps, device=ids.device))
        for layer in self.layers:
            x = layer(x, mask)
        return x @ self.output


class TextbookUnit(nn.Module):
    """h_t = tanh(x_t Wh + h_{t-1} Uh + b)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.Uh = nn.Parameter(torch.empty(dim, dim))
        self.Wh = nn.Parameter(torch.empty(dim, dim))
        self.b = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.Uh)
        nn.init.xavier_uniform_(self.Wh)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.Wh + h @ self.Uh + self.b)


class TextbookElman(nn.Module):
    """A stack of units, stepped through time together."""

    def __init__(self, emb_dim: int, num_layers: int) -> None:
        super().__init__()
        self.rnn_units = nn.ModuleList(TextbookUnit(emb_dim) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        states = [torch.zeros_like(x[:, 0]) for _ in self.rnn_units]
        outputs = []
        for t in range(x.shape[1]):
            value = x[:, t]
            for layer, unit in enumerate(self.rnn_units):
                value = unit(value, states[layer])
                states[layer] = value
            outputs.append(value)
        return torch.stack(outputs, dim=1)


class TextbookRecurrent(nn.Module):
    """Embedding, Elman stack, output layer: ids (B, T) to logits (B, T, V)."""

    def __init__(self, vocab_size: int, emb_dim: int, num_layers: int, pad_idx: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        self.rnn = TextbookElman(emb_dim, num_layers)
        self.fc = nn.Linear(emb_dim, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embedding(ids)))


def textbook_loss(model: nn.Module, ids: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy from all the logits at once."""
    logits = model(ids)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)


@torch.no_grad()
def textbook_generate(model: nn.Module, ids: Tensor, max_new_tokens: int) -> Tensor:
    """Greedy continuation of ids (B, T): the whole text goes through the model for every token."""
    for _ in range(max_new_tokens):
        next_ids = model(ids)[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, next_ids), dim=1)
    return ids
