"""`attn_implementation="lmfast"`: attention and masks for transformers' interfaces."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import output_capturing

from lmfast import ops
from lmfast._dispatch import BACKENDS
from lmfast._transforms import in_transform
from lmfast.ops._library import is_autocast

_COLLECTOR = getattr(output_capturing, "_active_collector", None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' models by `lmfast.ops.attention`.

    Args:
        module: the attention layer that calls.
        query: (B, H, T, D); key, value: (B, Hkv, S, D).
        attention_mask: bool (True: seen) or added to the scores; without one, the queries are the
            first T tokens of the keys if there are several (a static cache has room behind them),
            and a single query sees all keys.
        dropout: of the attention weights. They exist only in PyTorch's attention, which then runs.
        scaling: of the products; 1 / sqrt(D) by default.
        is_causal: whether a missing mask means the causal one; the module's attribute by default.
        backend: as in `lmfast.use_backend`.
        kwargs: `softcap` and `s_aux` (sinks) are used; weights are returned where
            the call has `output_attentions`, or that of the model.

    Returns:
        (B, T, H, D) contiguous, and the weights (B, H, T, S) or None.
    """
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length, keys = query.shape[2], key.shape[2]
    causal = causal and length > 1 and attention_mask is None
    if causal and keys > length:
        key, value = key[:, :, :length], value[:, :, :length]
    elif attention_mask is not None and attention_mask.shape[-1] > keys:
        attention_mask = attention_mask[..., :keys]
    if _weights_wanted(kwargs) or (dropout and (softcap or sinks is not None)):
        return _with_weights(
            query, key, value, attention_mask, dropout, scaling, causal, softcap, sinks
        )
    ends = getattr(key, "lmfast_ends", None)  # StaticTransformer: the mask is the rows' length
    alone = attention_mask is None or attention_mask.dtype == torch.bool
    if ends is not None and alone and length == 1 and key.shape == value.shape and not dropout:
        out = ops.cached_attention(
            query, key, value, ends, softcap=softcap, sinks=sinks, scale=scaling, backend=backend
        )
        return out.transpose(1, 2).contiguous(), None
    if dropout or kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    query, key, value = in_autocast_dtype(query, key, value)
    size = value.shape[-1]
    if size != query.shape[-1]:
        if size > query.shape[-1] or softcap or sinks is not None:
            return _with_weights(
                query, key, value, attention_mask, 0.0, scaling, causal, softcap, sinks
            )
        # The kernels have one head size: zeros behind the values give zeros behind the result.
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        value = nn.functional.pad(value, (0, query.shape[-1] - size))
    out = ops.attention(
        *(query, key, value),
        causal=causal,
        mask=attention_mask,
        scale=scaling,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
    )
    return out[..., :size].transpose(1, 2).contiguous(), None


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the call, or the model that makes it, collects attention weights.

    Some models do not pass `output_attentions` on to their layers: what transformers collects is
    then known from what it collects into.
    """
    if kwargs.get("output_attentions"):
        return True
    if _COLLECTOR is None:
        return False
    # Under torch.compile it is a plain variable, see transformers.
    collected = _COLLECTOR.global_var if torch.compiler.is_compiling() else _COLLECTOR.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that products have under autocast; as they are without it."""
    if not is_autocast(tensors[0]):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(tensors[0].device.type)) for t in tensors)


def mask_of(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for SDPA; always made where a padding mask has no numbers to look at.

    It is left out where nothing is padding, which "meta" tensors and those of a transform cannot
    say; transformers' own mask for written-out attention does not ask either.
    """
    padding = kwargs.get("attention_mask")
    if padding is not None and (padding.is_meta or in_transform()):
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(*args, **kwargs)


def _with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The formula with all weights written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale  # [B, H, T, S]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = weights[..., : key.shape[2]]
    out = nn.functional.dropout(weights, dropout) @ value
    return out.transpose(1, 2).contiguous(), weights


def name_for(backend: str | None) -> str:
    """What `attn_implementation` is with a backend."""
    return "lmfast" if backend is None else f"lmfast_{backend}"


def register() -> None:
    """Makes "lmfast", and "lmfast_torch" and so on for one backend, known.

    A name without a mask function would see no padding at all.
    """
    for backend in (None, *BACKENDS):
        function = functools.partial(attention_forward, backend=backend)
        AttentionInterface.register(
            name_for(backend), attention_forward if backend is None else function
        )
        AttentionMaskInterface.register(name_for(backend), mask_of)
