"""One pre-norm Transformer decoder block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lmfast.nn.attention import MultiHeadAttention
from lmfast.nn.mlp import MLP
from lmfast.nn.norm import RMSNorm

if TYPE_CHECKING:
    from lmfast.generation.cache import LayerCache


class DecoderBlock(nn.Module):
    """Attention and feed-forward layer, each behind a norm and around a residual connection.

        h = x + attn(norm1(x));   y = h + mlp(norm2(h))

    Args:
        emb_dim: model width E.
        num_heads: number H of query heads.
        num_kv_heads, head_dim, rope_base, rope_interleaved, rope_scaling: as in
            `MultiHeadAttention`.
        mlp_dim: hidden width of the feed-forward layer, 4 E by default.
        norm_eps: as in `RMSNorm`.

    Raises:
        ValueError: as the layers it is made of.

    Backends: those of `lmfast.ops.rms_norm`, `add_rms_norm` (the first residual sum and the second
    norm in one pass), `rope` and `attention`.

    Source: Xiong et al. 2020 (pre-norm), arXiv:2002.04745.

    Example:
        >>> import torch
        >>> DecoderBlock(32, 4)(torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        emb_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int | None = None,
        norm_eps: float = 1e-8,
        rope_base: float = 10000.0,
        rope_interleaved: bool = True,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(emb_dim, norm_eps)
        self.attn = MultiHeadAttention(
            emb_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_base=rope_base,
            rope_interleaved=rope_interleaved,
            rope_scaling=rope_scaling,
        )
        self.norm2 = RMSNorm(emb_dim, norm_eps)
        self.mlp = MLP(emb_dim, mlp_dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        positions: int | Tensor | None = None,
    ) -> Tensor:
        """Map (B, T, E) to (B, T, E); arguments as in `MultiHeadAttention.forward`."""
        attended = self.attn(self.norm1(x), mask, cache, positions)
        normed, x = self.norm2.add(attended, x)
        return x + self.mlp(normed)
