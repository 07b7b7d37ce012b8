"""Multi-head attention with one packed projection for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lmfast.cache import LayerCache
from lmfast.nn.attend import as_visible, attend, is_causal_mask
from lmfast.nn.norm import RMSNorm
from lmfast.nn.packed import PackedParameters
from lmfast.nn.rotary import RotaryEmbedding
from lmfast.nn.sizes import check_sizes
from lmfast.ops._attention_arguments import check_positive, check_scale


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of `MultiHeadAttention` but `norm_eps`, which blocks pass on."""

    num_kv_heads: int | None
    head_dim: int | None
    rope_base: float
    rope_interleaved: bool
    rope_scaling: Mapping[str, Any] | None
    rope_dim: int | None
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    window: int | None
    softcap: float | None
    scale: float | None


class MultiHeadAttention(PackedParameters):
    """Causal multi-head or grouped-query self-attention with rotary positions.

        head_h = softmax(rope(x W_Q) rope(x W_K)^T scale + mask) x W_V;   y = [head_0 ..] W_O

    Args:
        emb_dim: model width E.
        num_heads: number H of query heads.
        num_kv_heads: number Hkv of key/value heads, H by default; query head h reads key/value head
            h // (H / Hkv).
        head_dim: head size D, E / H by default.
        rope_base, rope_interleaved, rope_scaling: as in `RotaryEmbedding`.
        rope_dim: the first features of each head that are rotated, D by default.
        qkv_bias, o_bias: add a bias to queries, keys and values, and to the output.
        qk_norm: normalise every head's query and key by RMSNorm before the rotation, with one
            `q_norm.scale` and `k_norm.scale` (D) for all heads.
        window: sliding window: a token sees itself and the window - 1 before it, and with a mask,
            which takes the place of causality, also the window - 1 behind it; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        scale: of the scores, 1 / sqrt(D) by default.
        norm_eps: of `qk_norm`.

    The parameters are `W_QKV` (E, (H + 2 Hkv) D), whose columns are all query heads, then all key
    heads, then all value heads, and `W_O` (H D, E); with biases `B_QKV` and `B_O`. State dicts use
    the layout of one matrix per head, `heads.{h}.W_Q`, `heads.{h}.W_K`, `heads.{h}.W_V` (E, D),
    `heads.{h}.B_Q` and so on (D), and `W_O`: they are saved as views of the packed matrix and
    loaded bit for bit; a packed `W_QKV` loads as well.

    Raises:
        TypeError: `window` is not an integer, `softcap` or `scale` not a number.
        ValueError: a size, `window` or `softcap` is not positive, E is no multiple of H and
            `head_dim` is not given, H is no multiple of Hkv, or `rope_dim` exceeds D.

    Backends: those of `lmfast.ops.rope`, `lmfast.ops.attention` and `lmfast.ops.rms_norm`.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023 (groups), arXiv:2305.13245;
    Henry et al. 2020 (normalised queries and keys), arXiv:2010.04245.

    Example:
        >>> import torch
        >>> attention = MultiHeadAttention(32, 4)
        >>> attention(torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    B_QKV: nn.Parameter | None
    B_O: nn.Parameter | None

    def __init__(
        self,
        emb_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10000.0,
        rope_interleaved: bool = True,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_dim: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-8,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(emb_dim=emb_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if head_dim is None:
            if emb_dim % num_heads:
                raise ValueError(
                    f"emb_dim {emb_dim} must be a multiple of num_heads {num_heads}, "
                    "or head_dim must be given"
                )
            head_dim = emb_dim // num_heads
        else:
            check_sizes(head_dim=head_dim)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}"
            )
        if rope_dim is None and head_dim % 2:
            raise ValueError(
                f"head_dim must be even for rotary pairs, or rope_dim be given, got {head_dim}"
            )
        if rope_dim is not None and rope_dim > head_dim:
            raise ValueError(f"rope_dim must be at most head_dim {head_dim}, got {rope_dim}")
        check_positive("window", window, int)
        check_positive("softcap", softcap, float)
        check_scale(scale, head_dim)
        self.emb_dim = emb_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.softcap = softcap
        self.scale = scale
        packed = (num_heads + 2 * num_kv_heads) * head_dim
        self.W_QKV = nn.Parameter(torch.empty(emb_dim, packed))
        self.register_parameter("B_QKV", nn.Parameter(torch.empty(packed)) if qkv_bias else None)
        self.W_O = nn.Parameter(torch.empty(num_heads * head_dim, emb_dim))
        self.register_parameter("B_O", nn.Parameter(torch.empty(emb_dim)) if o_bias else None)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.rope = RotaryEmbedding(
            head_dim if rope_dim is None else rope_dim,
            rope_base,
            interleaved=rope_interleaved,
            scaling=rope_scaling,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform, each head's matrix by its own fan-in and fan-out (E, D); zero biases."""
        with torch.no_grad():
            for _, columns in self.part_views("W_QKV", self.W_QKV):
                nn.init.xavier_uniform_(columns)
        nn.init.xavier_uniform_(self.W_O)
        for bias in (self.B_QKV, self.B_O):
            if bias is not None:
                nn.init.zeros_(bias)

    def parts(self) -> dict[str, list[tuple[str, int]]]:
        """Return the heads' names and sizes, queries, keys and values in the packed order."""
        counts = {"Q": self.num_heads, "K": self.num_kv_heads, "V": self.num_kv_heads}
        heads = [(h, letter) for letter, count in counts.items() for h in range(count)]
        return {
            f"{kind}_QKV": [(f"heads.{h}.{kind}_{letter}", self.head_dim) for h, letter in heads]
            for kind in ("W", "B")
        }

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        positions: int | Tensor | None = None,
    ) -> Tensor:
        """Attend from every position of x to itself and what precedes it.

        Args:
            x: (B, T, E).
            mask: None for causal; otherwise zero or False = hidden, (T, S), (B, T, S) or
                (B, 1, T, S), in floating point only 0 and 1. A lower-triangular one in host memory
                is recognised as causal. S is T, or with a cache the longest row after this step,
                column j the row's token j; what is behind a row's end is not seen.
            cache: one layer of a `lmfast.KVCache`; keys and values are appended to it, and the
                queries continue where it ended.
            positions: for the rotation, as in `RotaryEmbedding.forward`; by default they continue
                the cache or start at 0.

        Returns:
            (B, T, E).

        Raises:
            TypeError: `cache` is not one layer's, or `positions` are not integers.
            ValueError: x or a mask of another shape, one to be added to the scores, or one beside a
                cache that keeps only a window of this layer.
        """
        if x.ndim != 3 or x.shape[2] != self.emb_dim:
            raise ValueError(f"x must be (B, T, {self.emb_dim}), got {tuple(x.shape)}")
        if cache is not None and hasattr(cache, "layer"):
            raise TypeError("cache must be one layer of a KVCache, cache.layer(i), got all of it")
        if isinstance(positions, float):
            raise TypeError(f"positions must be an int or a tensor of integers, got {positions}")
        batch, steps, _ = x.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.project(x, "W_QKV", "B_QKV")
        qkv = qkv.view(batch, steps, heads + 2 * kv_heads, self.head_dim)
        sizes = [heads, kv_heads, kv_heads]
        q, k, v = qkv.transpose(1, 2).split_with_sizes(sizes, dim=1)  # (B, H, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        options: dict[str, Any] = {
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
        }
        if cache is None:
            # Without gradients q and k are ours, fresh from the product: rotate them in place.
            inplace = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            q, k = self.rope(q, k, positions, inplace=inplace)
            out = attend(q, k, v, mask=mask, **options)  # (B, H, T, D)
        else:
            visible = None if mask is None or is_causal_mask(mask) else as_visible(mask)
            if visible is not None:
                cache.check_mask()
            rope = self.rope
            cos, sin = rope.tables(max(cache.longest + steps, 1), x.device)
            q = cache.rope_append(
                *(q, k, v, cos, sin), interleaved=rope.interleaved, positions=positions
            )
            out = cache.attend(q, mask=visible, **options)
        joined = out.transpose(1, 2).reshape(batch, steps, heads * self.head_dim)
        return self.project(joined, "W_O", "B_O")

    def extra_repr(self) -> str:
        return (
            f"{self.emb_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, window={self.window}, softcap={self.softcap}"
        )
