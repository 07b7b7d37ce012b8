"""The Transformer decoder language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.generation.cache import KVCache
from lmfast.models.base import LanguageModel, check_sizes
from lmfast.nn.block import DecoderBlock
from lmfast.nn.norm import RMSNorm


class _KeepRowFixed(torch.autograd.Function):
    """Identity whose gradient is zero in one row: the padding row of a shared matrix."""

    @staticmethod
    def forward(ctx, weight: Tensor, row: int) -> Tensor:
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_fill(0, torch.tensor(ctx.row, device=grads[0].device), 0), None


class DecoderLanguageModel(LanguageModel):
    """A pre-norm Transformer decoder with RMSNorm, rotary positions and an output matrix.

        x = embedding[ids];  x = block_i(x);  logits = x output

    Args:
        vocab_size: V.
        emb_dim: model width E.
        num_heads: number H of query heads.
        num_blocks: number of decoder blocks.
        pad_idx: id whose embedding is zero and never learnt, or None.
        num_kv_heads: number Hkv of key/value heads, H by default.
        head_dim: head size, E / H by default.
        mlp_dim: hidden width of the feed-forward layers, 4 E by default.
        final_norm: normalise before the output matrix.
        output_bias: add a bias to the logits.
        tie_weights: use the embedding as output matrix; the padding row then takes no part in
            learning and its logit is 0 before the bias.
        norm_eps: of all norms.
        rope_base, rope_interleaved, rope_scaling: as in `lmfast.nn.RotaryEmbedding`.

    State-dict names: `embedding.weight`, `layers.{i}.norm1.scale`, `.attn.heads.{h}.W_Q|W_K|W_V`,
    `.attn.W_O`, `.norm2.scale`, `.mlp.W_1|B_1|W_2|B_2`, `output` (E, V) unless tied, and with the
    options `norm.scale` and `output_bias`.

    Raises:
        ValueError: sizes that do not fit together.

    Backends: those of `lmfast.ops.rms_norm`, `add_rms_norm`, `rope`, `attention` and
    `linear_cross_entropy`.

    Example:
        >>> import torch
        >>> model = DecoderLanguageModel(50, 16, 2, 1, 0)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 50])
    """

    kind = "decoder"
    output: nn.Parameter | None
    output_bias: nn.Parameter | None

    def __init__(
        self,
        vocab_size: int,
        emb_dim: int,
        num_heads: int,
        num_blocks: int,
        pad_idx: int | None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int | None = None,
        final_norm: bool = False,
        output_bias: bool = False,
        tie_weights: bool = False,
        norm_eps: float = 1e-8,
        rope_base: float = 10000.0,
        rope_interleaved: bool = True,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size, emb_dim, pad_idx)
        if num_blocks < 1 or num_heads < 1:
            raise ValueError(
                f"num_blocks and num_heads must be at least 1, got {num_blocks} and {num_heads}"
            )
        self.vocab_size = vocab_size
        self.emb_dim = emb_dim
        self.pad_idx = pad_idx
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = emb_dim // num_heads if head_dim is None else head_dim
        self.options = {
            "vocab_size": vocab_size,
            "emb_dim": emb_dim,
            "num_heads": num_heads,
            "num_blocks": num_blocks,
            "pad_idx": pad_idx,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "mlp_dim": mlp_dim,
            "final_norm": final_norm,
            "output_bias": output_bias,
            "tie_weights": tie_weights,
            "norm_eps": norm_eps,
            "rope_base": rope_base,
            "rope_interleaved": rope_interleaved,
            "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
        }
        self.embedding = nn.Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        self.layers = nn.ModuleList(
            DecoderBlock(
                emb_dim,
                num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                mlp_dim=mlp_dim,
                norm_eps=norm_eps,
                rope_base=rope_base,
                rope_interleaved=rope_interleaved,
                rope_scaling=rope_scaling,
            )
            for _ in range(num_blocks)
        )
        self.norm = RMSNorm(emb_dim, norm_eps) if final_norm else None
        output = None if tie_weights else nn.Parameter(torch.empty(emb_dim, vocab_size))
        self.register_parameter("output", output)
        bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        self.register_parameter("output_bias", bias)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.output is not None:
            nn.init.xavier_uniform_(self.output)
        self._clear_padding()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the output layer's weight (V, E), a view, and bias (V) or None."""
        if self.output is not None:
            return self.output.t(), self.output_bias
        weight = self.embedding.weight
        if self.pad_idx is not None and torch.is_grad_enabled():
            weight = _KeepRowFixed.apply(weight, self.pad_idx)
        return weight, self.output_bias

    def hidden(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Return the features (B, T, E) before the output matrix.

        Args:
            ids: (B, T) int64.
            attention_mask: (B, T), nonzero at real tokens. Only padding in front of a row needs it:
                what follows a token cannot reach it anyway.
        """
        mask, positions = None, None
        if attention_mask is not None:
            if attention_mask.shape != ids.shape:
                raise ValueError(
                    f"attention_mask must have the shape of ids {tuple(ids.shape)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            real = attention_mask.bool()
            positions = (real.cumsum(1) - 1).clamp_min(0)  # (B, T)
            visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
            mask = visible.tril() & real[:, None, None]  # (B, 1, T, T)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, mask, None, positions)
        return x if self.norm is None else self.norm(x)

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Map ids (B, T) int64 to logits (B, T, V); `attention_mask` as in `hidden`."""
        return self._logits(self.hidden(ids, attention_mask=attention_mask))

    def new_state(self, batch: int, capacity: int | None = None) -> KVCache:
        """Return an empty key/value cache for `batch` rows."""
        return KVCache(
            len(self.layers),
            batch,
            self.num_kv_heads,
            self.head_dim,
            max_length=capacity,
            dtype=self.embedding.weight.dtype,
            device=self.embedding.weight.device,
        )

    def advance(
        self, ids: Tensor, state: KVCache, lengths: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        """Append the tokens to the cache and return their features (B, T, E) and the cache."""
        wanted = None if lengths is None else state.lengths + lengths
        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, None, state.layer(index), None)
        if wanted is not None:  # what was appended behind a row's end is forgotten again
            state.truncate(wanted)
        return (x if self.norm is None else self.norm(x)), state
