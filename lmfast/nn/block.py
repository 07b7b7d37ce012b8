"""One pre-norm Transformer decoder block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lmfast.cache import LayerCache
from lmfast.nn.attention import AttentionOptions, MultiHeadAttention
from lmfast.nn.mlp import ACTIVATIONS, MLP, GeGLU, SwiGLU
from lmfast.nn.norm import RMSNorm

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The feed-forward layers by name: gated ones, and activations of `MLP`.
_GATED = {"swiglu": SwiGLU, "geglu": GeGLU}


class BlockOptions(AttentionOptions, total=False):
    """The keyword arguments of `DecoderBlock` but `norm_eps`, which models pass on."""

    mlp: str
    mlp_dim: int | None
    mlp_bias: bool | None
    post_norms: bool


class DecoderBlock(nn.Module):
    """Attention and feed-forward layer, each behind a norm and around a residual connection.

        h = x + attn(norm1(x));   y = h + mlp(norm2(h))

    Args:
        emb_dim: model width E.
        num_heads: number H of query heads.
        mlp: the feed-forward layer: "relu", "gelu", "gelu_tanh" or "silu" for an `MLP` with that
            activation, "swiglu" or "geglu" for the gated layers.
        mlp_dim: hidden width of the feed-forward layer; its own default if None.
        mlp_bias: whether it has biases; its own default if None.
        norm_eps: as in `RMSNorm`, for all norms of the block.
        post_norms: normalise what attention and feed-forward layer return, before it is added, by
            `post_norm1` and `post_norm2`.
        attention: the other keyword arguments of `MultiHeadAttention`.

    Raises:
        TypeError: an argument that `MultiHeadAttention` does not have.
        ValueError: as the layers it is made of.

    Backends: those of `lmfast.ops.rms_norm`, `add_rms_norm` (each residual sum and the norm that
    follows it in one pass), `rope` and `attention`.

    Source: Xiong et al. 2020 (pre-norm), arXiv:2002.04745.

    Example:
        >>> import torch
        >>> DecoderBlock(32, 4, mlp="swiglu", num_kv_heads=2)(torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        emb_dim: int,
        num_heads: int,
        *,
        mlp: str = "relu",
        mlp_dim: int | None = None,
        mlp_bias: bool | None = None,
        norm_eps: float = 1e-8,
        post_norms: bool = False,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(emb_dim, norm_eps)
        self.attn = MultiHeadAttention(emb_dim, num_heads, norm_eps=norm_eps, **attention)
        self.post_norm1 = RMSNorm(emb_dim, norm_eps) if post_norms else None
        self.norm2 = RMSNorm(emb_dim, norm_eps)
        self.mlp: nn.Module
        if mlp in _GATED:
            self.mlp = _GATED[mlp](emb_dim, mlp_dim, bias=bool(mlp_bias))
        elif mlp in ACTIVATIONS:
            self.mlp = MLP(emb_dim, mlp_dim, activation=mlp, bias=mlp_bias is not False)
        else:
            kinds = ", ".join((*ACTIVATIONS, *_GATED))
            raise ValueError(f"mlp must be one of {kinds}, got {mlp!r}")
        self.post_norm2 = RMSNorm(emb_dim, norm_eps) if post_norms else None

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        positions: int | Tensor | None = None,
        as_pair: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, T, E) to (B, T, E).

        Args:
            x: (B, T, E), or a pair of such tensors whose sum is meant.
            mask, cache, positions: as in `MultiHeadAttention.forward`.
            as_pair: return a pair whose sum is the result. The next block then adds the two in the
                same pass as it normalises them.
        """
        if isinstance(x, tuple):
            normed, x = self.norm1.add(*x)
        else:
            normed = self.norm1(x)
        update = self.attn(normed, mask, cache, positions)
        if self.post_norm1 is not None:
            update = self.post_norm1(update)
        normed, x = self.norm2.add(update, x)
        update = self.mlp(normed)
        if self.post_norm2 is not None:
            update = self.post_norm2(update)
        return (update, x) if as_pair else x + update
