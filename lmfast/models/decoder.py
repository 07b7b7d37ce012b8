"""The Transformer decoder language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmfast.cache import KVCache, LayerCache
from lmfast.models.base import LanguageModel, check_ids, check_sizes, keep_row_fixed
from lmfast.nn import sizes
from lmfast.nn.block import BlockOptions, DecoderBlock
from lmfast.nn.embedding import Embedding
from lmfast.nn.norm import RMSNorm
from lmfast.ops._attention_arguments import check_positive

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DecoderLanguageModel(LanguageModel):
    """A pre-norm Transformer decoder with RMSNorm, rotary positions and an output matrix.

        x = embedding[ids];  x = block_i(x);  logits = x output

    Args:
        vocab_size: V.
        emb_dim: model width E.
        num_heads: number H of query heads.
        num_blocks: number of decoder blocks.
        pad_idx: id whose embedding is zero and never learnt, or None.
        final_norm: normalise before the output matrix.
        output_bias: add a bias to the logits.
        tie_weights: use the embedding as output matrix; the padding row then takes no part in
            learning and its logit is 0 before the bias.
        embedding_scale: the embedding is multiplied by it.
        logit_softcap: logits become ``logit_softcap * tanh(logit / logit_softcap)``.
        windows: a sliding window, or None, for every block; in the place of `window`.
        norm_eps: of all norms.
        block: the other keyword arguments of `lmfast.nn.DecoderBlock`, and so of
            `lmfast.nn.MultiHeadAttention`: `mlp`, `mlp_dim`, `mlp_bias`, `post_norms`,
            `num_kv_heads`, `head_dim`, `rope_base`, `rope_interleaved`, `rope_scaling`, `rope_dim`,
            `qkv_bias`, `o_bias`, `qk_norm`, `window`, `softcap`, `scale`.

    A model in the style of Llama has ``final_norm=True, mlp="swiglu", rope_interleaved=False,
    norm_eps=1e-6`` and `num_kv_heads`; Qwen 3 adds ``qk_norm=True``, Mistral a `window`, Gemma 2
    ``mlp="geglu"``, `post_norms`, the softcaps and an `embedding_scale`.

    State-dict names: `embedding.weight`, `layers.{i}.norm1.scale`, `.attn.heads.{h}.W_Q|W_K|W_V`,
    `.attn.W_O`, `.norm2.scale`, `.mlp.W_1|B_1|W_2|B_2` or `.mlp.W_G|W_U|W_D`, `output` (E, V)
    unless tied, and with the options `norm.scale`, `output_bias` and those of the layers.

    Raises:
        TypeError: an argument that the blocks do not have, or of another kind.
        ValueError: sizes that do not fit together, or a softcap that is not positive.

    Backends: those of `lmfast.ops.rms_norm`, `add_rms_norm`, `rope`, `attention`, `swiglu` and
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
        final_norm: bool = False,
        output_bias: bool = False,
        tie_weights: bool = False,
        embedding_scale: float | None = None,
        logit_softcap: float | None = None,
        windows: Sequence[int | None] | None = None,
        norm_eps: float = 1e-8,
        **block: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        check_sizes(vocab_size, emb_dim, pad_idx)
        sizes.check_sizes(num_heads=num_heads, num_blocks=num_blocks)
        check_positive("logit_softcap", logit_softcap, float)
        if windows is None:
            windows = [block.get("window")] * num_blocks
        elif len(windows) != num_blocks or "window" in block:
            raise ValueError(
                f"windows must have one entry for each of {num_blocks} blocks and stand in the "
                f"place of window, got {len(windows)} entries"
            )
        self.vocab_size = vocab_size
        self.emb_dim = emb_dim
        self.pad_idx = pad_idx
        self.embedding_scale = embedding_scale
        self.logit_softcap = logit_softcap
        self.options = {
            "vocab_size": vocab_size,
            "emb_dim": emb_dim,
            "num_heads": num_heads,
            "num_blocks": num_blocks,
            "pad_idx": pad_idx,
            "final_norm": final_norm,
            "output_bias": output_bias,
            "tie_weights": tie_weights,
            "embedding_scale": embedding_scale,
            "logit_softcap": logit_softcap,
            "windows": list(windows),
            "norm_eps": norm_eps,
            **{name: value for name, value in block.items() if name != "window"},
        }
        scaling = block.get("rope_scaling")
        if scaling is not None:
            self.options["rope_scaling"] = dict(scaling)
        self.embedding = Embedding(vocab_size, emb_dim, padding_idx=pad_idx)
        blocks = []
        for window in windows:
            block["window"] = window
            blocks.append(DecoderBlock(emb_dim, num_heads, norm_eps=norm_eps, **block))
        self.layers = nn.ModuleList(blocks)
        self.num_kv_heads = blocks[0].attn.num_kv_heads
        self.head_dim = blocks[0].attn.head_dim
        self.norm = RMSNorm(emb_dim, norm_eps) if final_norm else None
        output = None if tie_weights else nn.Parameter(torch.empty(emb_dim, vocab_size))
        self.register_parameter("output", output)
        bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        self.register_parameter("output_bias", bias)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.output is not None:
            nn.init.xavier_uniform_(self.output)
        self.embedding.clear_padding()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the output layer's weight (V, E), a view, and bias (V) or None."""
        if self.output is not None:
            return self.output.t(), self.output_bias
        self.embedding.clear_padding()
        return keep_row_fixed(self.embedding.weight, self.pad_idx), self.output_bias

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
        return self._run(ids, mask, None, positions)

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
            window=self.options["windows"],
            dtype=self.embedding.weight.dtype,
            device=self.embedding.weight.device,
        )

    def advance(
        self, ids: Tensor, state: KVCache, lengths: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        """Append the tokens to the cache and return their features (B, T, E) and the cache."""
        counts = None if lengths is None else lengths.tolist()  # padding is not stored
        return self._run(
            ids, None, [state.layer(i, counts) for i in range(len(self.layers))]
        ), state

    def _run(
        self,
        ids: Tensor,
        mask: Tensor | None,
        caches: Sequence[LayerCache] | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the features (B, T, E) before the output matrix."""
        check_ids(ids)
        x = self.embedding(ids)
        if self.embedding_scale is not None:
            # Rounded to the dtype first, as models trained in bf16 have it.
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype, device=x.device)
        # From block to block go the last update and what it is to be added to: the norm that
        # follows adds them in its own pass.
        for index, layer in enumerate(self.layers):
            x = layer(x, mask, None if caches is None else caches[index], positions, True)
        update, x = x
        return x + update if self.norm is None else self.norm.add(update, x)[0]
