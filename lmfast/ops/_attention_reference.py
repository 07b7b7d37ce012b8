"""Attention in plain PyTorch: the contract in readable form, and the fallback for every option.

It stores the (T, S) matrix of scores; the kernels do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast.ops._library import accumulation_dtype


class Options(NamedTuple):
    """What ``attention`` takes besides q, k and v, normalised; the order of the operators."""

    causal: bool
    offset: int | None  # position of every row's query 0; or
    offsets: Tensor | None  # (B,) int64; neither: lengths - T
    lengths: Tensor | None  # (B,) int64
    mask: Tensor | None  # (B, H, T, S), bool or floating point
    window: int  # 0: none
    softcap: float  # 0: none
    sinks: Tensor | None  # (H,)
    alibi: Tensor | None  # (H,)
    scale: float


def query_positions(length: int, keys: int, options: Options, device: torch.device) -> Tensor:
    """(B or 1, T) int64: the absolute position of every query."""
    if options.offsets is not None:
        start = options.offsets
    elif options.offset is not None:
        start = torch.full((1,), options.offset, dtype=torch.int64, device=device)
    elif options.lengths is not None:
        start = options.lengths - length
    else:
        start = torch.full((1,), keys - length, dtype=torch.int64, device=device)
    return start[:, None] + torch.arange(length, device=device)


def visible_keys(length: int, keys: int, options: Options, device: torch.device) -> Tensor:
    """(B or 1, T, S) bool: which keys each query sees by causality, window and lengths."""
    at = query_positions(length, keys, options, device)[:, :, None]
    key = torch.arange(keys, device=device)
    visible = torch.ones((1, 1, keys), dtype=torch.bool, device=device).expand(at.shape[0], -1, -1)
    if options.lengths is not None:
        visible = visible & (key < options.lengths[:, None, None])
    if options.causal:
        visible = visible & (key <= at)
    if options.window > 0:
        visible = visible & (key > at - options.window)
        if not options.causal:
            visible = visible & (key < at + options.window)
    return visible.expand(-1, length, -1)


def hidden_by_mask(mask: Tensor) -> Tensor:
    """Where a mask hides a key: False, -inf, or the lowest number of its dtype."""
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min


def reference(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """softmax(scale q k^T + ...) v, as ``lmfast.ops.attention`` defines it."""
    o = Options(*options)
    batch, heads, length, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    dtype = accumulation_dtype(q.dtype)
    if o.lengths is not None:  # what lies behind a row's keys may be anything, NaN included
        behind = torch.arange(keys, device=k.device) >= o.lengths[:, None]
        k = k.masked_fill(behind[:, None, :, None], 0)
        v = v.masked_fill(behind[:, None, :, None], 0)
    grouped = q.to(dtype).reshape(batch, kv_heads, group * length, width)
    scores = (grouped @ k.to(dtype).transpose(-1, -2)).view(batch, heads, length, keys) * o.scale
    if o.softcap > 0:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    if o.alibi is not None:
        at = query_positions(length, keys, o, q.device)
        distance = torch.arange(keys, device=q.device) - at[:, :, None]  # (B or 1, T, S)
        scores = scores + o.alibi.to(dtype)[:, None, None] * distance[:, None].to(dtype)
    hidden = ~visible_keys(length, keys, o, q.device)[:, None]
    if o.mask is not None:
        hidden = hidden | hidden_by_mask(o.mask)
        if o.mask.dtype != torch.bool:
            scores = scores + o.mask.masked_fill(hidden_by_mask(o.mask), 0).to(dtype)
    scores = scores.masked_fill(hidden, -torch.inf)
    # Any shift gives the same result; the largest score keeps exp from overflowing.
    shift = scores.new_full((batch, heads, length, 1), -torch.inf)
    if keys > 0:
        shift = scores.detach().amax(-1, keepdim=True)
    if o.sinks is not None:
        sink = o.sinks.to(dtype)[:, None, None]
        shift = torch.maximum(shift, sink.detach())
    shift = shift.masked_fill(shift == -torch.inf, 0)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    if o.sinks is not None:
        total = total + torch.exp(sink - shift)
    weights = weights / total.masked_fill(total == 0, 1)
    out = weights.view(batch, kv_heads, group * length, keys) @ v.to(dtype)
    return out.view(batch, heads, length, width).to(q.dtype)


def peer(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """PyTorch's own operator where it has the options, else the formula in q's dtype.

    The measure of the error rule: ``reference`` computes in fp32 whatever the dtype.
    """
    o = Options(*options)
    length, keys = q.shape[2], k.shape[2]
    hidden = ~visible_keys(length, keys, o, q.device)[:, None].expand(*q.shape[:3], keys)
    bias = torch.zeros((1, 1, 1, 1), dtype=accumulation_dtype(q.dtype), device=q.device)
    if o.alibi is not None:
        at = query_positions(length, keys, o, q.device)[:, None, :, None]
        distance = torch.arange(keys, device=q.device) - at
        bias = bias + o.alibi.to(bias.dtype)[:, None, None] * distance.to(bias.dtype)
    if o.mask is not None:
        hidden = hidden | hidden_by_mask(o.mask)
        if o.mask.dtype != torch.bool:
            bias = bias + o.mask.masked_fill(hidden_by_mask(o.mask), 0)
    if o.lengths is not None:
        behind = torch.arange(keys, device=k.device) >= o.lengths[:, None]
        k = k.masked_fill(behind[:, None, :, None], 0)
        v = v.masked_fill(behind[:, None, :, None], 0)
    bias = bias.masked_fill(hidden, -torch.inf).to(q.dtype)
    nothing = hidden.all(-1, keepdim=True)
    if o.softcap == 0 and o.sinks is None and keys > 0 and q.numel() > 0:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=o.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.masked_fill(nothing, 0)
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * o.scale
    if o.softcap > 0:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    scores = scores + bias
    if o.sinks is not None:
        sinks = o.sinks.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = torch.softmax(scores, -1)[..., :keys]
    return weights.masked_fill(nothing, 0) @ v.repeat_interleave(group, 1)
