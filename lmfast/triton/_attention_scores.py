"""What the attention kernels share: scores of a tile, and how options are passed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.ops._attention_reference import Options
from lmfast.triton._launch import INTERPRETED, next_power_of_2


@triton.jit
def row_start(offset, offsets_ptr, lengths_ptr, batch, length, keys, AFTER_LENGTHS: tl.constexpr):
    """(position of query 0, number of keys) of a batch row."""
    limit = keys
    if lengths_ptr is not None:
        # Never beyond the storage: the host cannot look at lengths without waiting for them.
        limit = tl.minimum(tl.load(lengths_ptr + batch), keys).to(tl.int32)
    if offsets_ptr is not None:
        return tl.load(offsets_ptr + batch).to(tl.int32), limit
    if AFTER_LENGTHS:
        return limit - length, limit
    return offset + limit * 0, limit


@triton.jit
def rows_of(ptr, batch, head, token, stride0, stride1, stride2, d):
    """Pointers to the rows of tokens, (tokens, head size); a head each, or one for all."""
    at = batch * stride0 + head.to(tl.int64) * stride1 + token.to(tl.int64) * stride2
    return ptr + at[:, None] + d[None, :]


@triton.jit
def keys_for(
    start,
    first,
    length,
    limit,
    window,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(first, end) of the keys that some row of a tile, which begins at row `first`, may see."""
    last_token = tl.minimum((first + BLOCK_M - 1) // GROUP, length - 1)
    low, high = limit * 0, limit
    if CAUSAL:
        high = tl.minimum(high, start + last_token + 1)
    if WINDOW:
        low = tl.maximum(0, start + first // GROUP - window + 1) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            high = tl.minimum(high, start + last_token + window)
    return low, high


@triton.jit
def scores_of(
    q,
    k,
    position,
    key,
    limit,
    slope,
    mask_row,
    mask_key,
    inside,
    mask_lowest,
    window,
    softcap,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    key_scale=None,
):
    """Scores in base 2, -inf where hidden, and d(score) / d(scaled product), of one tile."""
    log2_e: tl.constexpr = 1.4426950408889634
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if key_scale is not None:
        s *= key_scale[None, :]
    slope_of_cap = s
    if SOFTCAP:
        # The interpreter and the compiler share no tanh.
        cap = 1.0 - 2.0 / (1.0 + tl.exp(s * (2.0 * scale / softcap)))
        s = cap * (softcap * log2_e)
        slope_of_cap = 1.0 - cap * cap
    else:
        s *= scale * log2_e
    seen = inside & (key < limit)[None, :]
    distance = key[None, :] - position[:, None]
    if slope is not None:
        s += slope[:, None] * log2_e * distance.to(tl.float32)
    if CAUSAL:
        seen = seen & (distance <= 0)
    if WINDOW:
        seen = seen & (distance > -window)
        if not CAUSAL:
            seen = seen & (distance < window)
    if mask_row is not None:
        given = tl.load(mask_row + mask_key, mask=seen, other=0)
        if given.dtype == tl.int1:
            seen = seen & given
        else:
            added = given.to(tl.float32)
            seen = seen & (added > mask_lowest)
            s += tl.where(seen, added * log2_e, 0.0)
    return tl.where(seen, s, float("-inf")), slope_of_cap


def arguments(o: Options, q: Tensor, k: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What forward and backward kernels take alike: scalars, and compile-time values."""
    length, keys = q.shape[2], k.shape[2]
    lowest = 0.0
    if o.mask is not None and o.mask.dtype != torch.bool:
        lowest = torch.finfo(o.mask.dtype).min
    scalars = (keys - length if o.offset is None else o.offset, length, keys, o.window)
    constants = {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[3],
        "AFTER_LENGTHS": o.lengths is not None and o.offset is None,
        "CAUSAL": o.causal,
        "WINDOW": o.window > 0,
        "SOFTCAP": o.softcap > 0,
        "DOT_FP32": INTERPRETED and q.dtype == torch.bfloat16,
        "BLOCK_D": max(16, next_power_of_2(q.shape[3])),
    }
    return (scalars, (o.softcap, o.scale, lowest)), constants


def mask_strides(o: Options) -> tuple[int, ...]:
    return (0, 0, 0, 0) if o.mask is None else o.mask.stride()
