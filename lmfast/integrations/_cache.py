"""A `Cache` of transformers whose keys and values lie in an `lmfast.KVCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from lmfast.generation import KVCache
from lmfast.generation.transformers.runner import ATTENDING


class _Layer(CacheLayerMixin):
    """One layer's view of the common cache; reports what masks are made from."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: LMFastCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.owner.make(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kv = self.owner.kv
        assert kv is not None
        sizes = key_states.shape[-1], value_states.shape[-1]
        if sizes[0] == sizes[1]:
            return kv.append(self.index, key_states, value_states)
        # The storage has one head size: zeros behind the shorter of the two.
        keys, values = kv.append(
            self.index,
            nn.functional.pad(key_states, (0, kv.head_dim - sizes[0])),
            nn.functional.pad(value_states, (0, kv.head_dim - sizes[1])),
        )
        return keys[..., : sizes[0]], values[..., : sizes[1]]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        kv = self.owner.kv
        return 0 if kv is None else kv.longest

    def get_max_length(self) -> int:
        return -1 if self.owner.max_length is None else self.owner.max_length


class LMFastCache(Cache):
    """Keys and values of a transformers model in preallocated storage.

    A token is stored where it stays, instead of copying all that came before (`DynamicCache`), and
    attention reads only what is there, instead of the whole reserved length (`StaticCache`).
    `reorder_cache` and the batch operations of beam search copy nothing: rows share blocks.

    Args:
        config: of the model; its text configuration is used.
        max_length: tokens per row there may be; None = without limit.

    Layers with a sliding window keep all tokens here, hidden by the mask. All layers have the same
    head sizes; where values have another than keys, the storage has the larger one for both.
    Without gradients. `generate` of transformers 5.24 calls its argument `cache` and warns of
    `past_key_values`, the only name that 5.17 knows.

    Raises:
        ValueError: the model's layers do not all attend (state-space or linear attention layers).

    Backends: those of `lmfast.KVCache`.

    Example:
        >>> import torch, transformers
        >>> from lmfast.integrations.transformers import LMFastCache
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, eos_token_id=None,
        ... )
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> ids, cache = torch.tensor([[1, 5, 7]]), LMFastCache(config)
        >>> out = model.generate(ids, max_new_tokens=4, past_key_values=cache, do_sample=False)
        >>> cache.get_seq_length()
        6
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ())
        if not kinds <= ATTENDING:
            raise ValueError(
                f"config has layers of types {', '.join(sorted(kinds))}; LMFastCache keeps keys "
                "and values only, use the model's own cache"
            )
        self.max_length = max_length
        self.kv: KVCache | None = None
        super().__init__(layers=[_Layer(self, i) for i in range(text.num_hidden_layers)])

    def make(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the storage when the first keys come."""
        if self.kv is None:
            batch, heads, _, size = key_states.shape
            size = max(size, value_states.shape[-1])
            self.kv = KVCache(
                len(self.layers),
                batch,
                heads,
                size,
                max_length=self.max_length,
                dtype=key_states.dtype,
                device=key_states.device,
            )

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens."""
        return -1 if self.kv is None else self.kv.batch

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        if self.kv is not None:
            self.kv.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of all rows; the number is negative, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be negative: minus the tokens to forget, "
                f"got {tokens_to_remove}"
            )
        if tokens_to_remove and self.kv is not None:
            self.kv.truncate(max(0, self.kv.longest + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows in the given order, as beam search asks for."""
        if self.kv is not None:
            self.kv.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, next to itself."""
        if self.kv is not None:
            self.kv.reorder(torch.arange(self.kv.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; indices or a boolean mask."""
        if self.kv is not None:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self.kv.reorder(indices)
