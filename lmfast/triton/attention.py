"""Attention forward for NVIDIA GPUs: one kernel from decoding to prefill, every option.

Floor: prefill, 4 T S H D operations (half of it causal) on the matrix units; decoding, the bytes
of k and v once. The query heads that share a key head are packed into one tile of rows: grouped
queries then read each key once, and one decoding token of a group fills a matrix instruction. With
few rows the keys are cut into parts that run side by side, and a second kernel joins them; a part
is cut from the keys a row really has, so a long empty cache costs nothing.

Scores and sums are fp32, in base 2 from the one multiplication that scales them: the backward
takes the saved log-sum-exp from the very same numbers, so that large scores cancel. Weights are
rounded to the dtype of v before they meet it, and the sum they are divided by is taken after that
rounding, so that they still add up to one. fp32 is multiplied as three tf32 products on the matrix
units: plain fp32 products spill 7.8 KB per thread at head size 256.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.ops._attention_reference import Options
from lmfast.triton._launch import INTERPRETED, multiprocessors, next_power_of_2, on_device

# More rows than this fill the multiprocessors without cutting the keys into parts.
_MOST_ROWS_TO_SPLIT = 64
_LEAST_KEYS_PER_PART = 256


@triton.jit
def row_start(offset, offsets_ptr, lengths_ptr, batch, length, keys, AFTER_LENGTHS: tl.constexpr):
    """(position of query 0, number of keys) of a batch row."""
    limit = keys
    if lengths_ptr is not None:
        limit = tl.load(lengths_ptr + batch).to(tl.int32)
    if offsets_ptr is not None:
        return tl.load(offsets_ptr + batch).to(tl.int32), limit
    if AFTER_LENGTHS:
        return limit - length, limit
    return offset + limit * 0, limit


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
):
    """Scores in base 2, -inf where hidden, and d(score) / d(scaled product), of one tile."""
    log2_e: tl.constexpr = 1.4426950408889634
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
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


@triton.jit(do_not_specialize=["offset", "length", "keys", "window", "splits"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    offsets_ptr,
    lengths_ptr,
    mask_ptr,
    sinks_ptr,
    alibi_ptr,
    offset,
    length,
    keys,
    window,
    splits,
    softcap,
    scale,
    mask_lowest,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    v0,
    v1,
    v2,
    o0,
    o1,
    o2,
    m0,
    m1,
    m2,
    m3,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    AFTER_LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    DOT_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv_heads: tl.constexpr = HEADS // GROUP
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    part = tl.program_id(2)
    start, limit = row_start(offset, offsets_ptr, lengths_ptr, batch, length, keys, AFTER_LENGTHS)

    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    rows = length * GROUP
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = start + token
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None]
    q_at = head.to(tl.int64) * q1 + token.to(tl.int64) * q2
    q_mask = inside & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + batch * q0 + q_at[:, None] + d[None, :], mask=q_mask, other=0.0)
    if DOT_FP32:
        q = q.to(tl.float32)
    slope = None
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + head, mask=row < rows, other=0.0)
    mask_row = None
    if mask_ptr is not None:
        mask_at = batch * m0 + head.to(tl.int64) * m1 + token.to(tl.int64) * m2
        mask_row = mask_ptr + mask_at[:, None]

    # The keys some row of the tile may see, and of those this part's share.
    last_token = tl.minimum((first + BLOCK_M - 1) // GROUP, length - 1)
    low, high = 0, limit
    if CAUSAL:
        high = tl.minimum(high, start + last_token + 1)
    if WINDOW:
        low = tl.maximum(0, start + first // GROUP - window + 1) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            high = tl.minimum(high, start + last_token + window)
    if PARTS:
        per_part = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), splits) * BLOCK_N
        low = low + part * per_part
        high = tl.minimum(high, low + per_part)

    k_base = k_ptr + batch * k0 + kv_head.to(tl.int64) * k1
    v_base = v_ptr + batch * v0 + kv_head.to(tl.int64) * v1
    log2_e: tl.constexpr = 1.4426950408889634
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(low, high, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        kv_mask = (key < limit)[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_base + key.to(tl.int64)[:, None] * k2 + d[None, :], mask=kv_mask, other=0.0)
        if DOT_FP32:
            k = k.to(tl.float32)
        s, _ = scores_of(
            q,
            k,
            position,
            key,
            limit,
            slope,
            mask_row,
            key.to(tl.int64)[None, :] * m3,
            inside,
            mask_lowest,
            window,
            softcap,
            scale,
            CAUSAL,
            WINDOW,
            SOFTCAP,
        )
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        v = tl.load(v_base + key.to(tl.int64)[:, None] * v2 + d[None, :], mask=kv_mask, other=0.0)
        if DOT_FP32:
            v = v.to(tl.float32)
        p = p.to(v.dtype)
        correction = tl.exp2(top - shift)
        total = total * correction + tl.sum(p.to(tl.float32), axis=1)
        acc = tl.dot(p, v, acc * correction[:, None], input_precision="tf32x3")
        top = new_top

    lse_at = (batch * HEADS + head) * length + token
    if PARTS:
        # (out, top, total) of this part, joined by the next kernel.
        lse_at = (lse_at * splits + part) * 2
        tl.store(lse_ptr + lse_at, top, mask=row < rows)
        tl.store(lse_ptr + lse_at + 1, total, mask=row < rows)
        out_at = ((batch * HEADS + head) * length + token) * splits + part
        out_at = out_at[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_ptr + out_at, acc, mask=q_mask)
    else:
        seen = total > 0
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=row < rows, other=0.0) * log2_e
            new_top = tl.maximum(top, sink)
            correction = tl.exp2(top - new_top)
            total = total * correction + tl.exp2(sink - new_top)
            acc *= correction[:, None]
            top = new_top
        acc = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
        tl.store(lse_ptr + lse_at, lse, mask=row < rows)
        o_at = head.to(tl.int64) * o1 + token.to(tl.int64) * o2
        o_ptr = out_ptr + batch * o0 + o_at[:, None] + d[None, :]
        tl.store(o_ptr, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["length", "splits"])
def _attention_join_kernel(
    parts_ptr,
    sums_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    length,
    splits,
    o0,
    o1,
    o2,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    log2_e: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)  # (batch, head, token)
    head = (row // length) % HEADS
    part = tl.arange(0, PARTS)
    d = tl.arange(0, BLOCK_D)
    there = part < splits
    at = row * splits + part
    top = tl.load(sums_ptr + 2 * at, mask=there, other=float("-inf"))
    total = tl.load(sums_ptr + 2 * at + 1, mask=there, other=0.0)
    shift = tl.max(top, axis=0)
    seen = shift > float("-inf")
    sink = shift
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head) * log2_e
        shift = tl.maximum(shift, sink)
    shift = tl.where(seen, shift, 0.0)
    weight = tl.where(there, tl.exp2(top - shift), 0.0)
    whole = tl.sum(total * weight, axis=0)
    if sinks_ptr is not None:
        whole += tl.exp2(sink - shift)
    whole = tl.where(seen, whole, 1.0)
    mask = there[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    out = tl.where(seen, tl.sum(parts * weight[:, None], axis=0) / whole, 0.0)
    o_at = (row // length) // HEADS * o0 + head * o1 + (row % length) * o2
    tl.store(out_ptr + o_at + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + row, tl.where(seen, shift + tl.log2(whole), float("inf")))


def tile(rows: int, q: Tensor) -> dict[str, int]:
    """Tile of rows x keys, warps and pipeline depth for a head size and dtype."""
    wide = next_power_of_2(q.shape[3]) * q.element_size() > 256
    if rows <= _MOST_ROWS_TO_SPLIT:
        return {
            "BLOCK_M": max(16, next_power_of_2(rows)),
            "BLOCK_N": 32 if wide else 64,
            "num_warps": 4,
            "num_stages": 2 if wide else 3,
        }
    if q.dtype == torch.float32:
        size = next_power_of_2(q.shape[3])
        block = 64 if size <= 64 else 32 if size <= 128 else 16
        return {
            "BLOCK_M": block,
            "BLOCK_N": 32,
            "num_warps": 8 if block == 64 else 4,
            "num_stages": 2,
        }
    return {
        "BLOCK_M": 64 if wide else 128,
        "BLOCK_N": 32 if wide else 64,
        "num_warps": 4 if wide else 8,
        "num_stages": 2 if wide else 3,
    }


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


def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; the arguments of ``lmfast::attention``."""
    o = Options(*options)
    batch, heads, length, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if lse.numel() == 0 or width == 0:
        return out, lse.fill_(torch.inf) if keys == 0 else lse
    rows = length * heads // kv_heads
    shape = tile(rows, q)
    tiles = triton.cdiv(rows, shape["BLOCK_M"]) * batch * kv_heads
    splits = 1
    if rows <= _MOST_ROWS_TO_SPLIT:
        wanted = triton.cdiv(2 * multiprocessors(q.device), tiles)
        splits = max(1, min(wanted, triton.cdiv(keys, _LEAST_KEYS_PER_PART), 128))
    (scalars, floats), constants = arguments(o, q, k)
    parts, sums, o_strides = out, lse, out.stride()[:3]
    if splits > 1:
        parts = q.new_empty((batch, heads, length, splits, width), dtype=torch.float32)
        sums = q.new_empty((batch, heads, length, splits, 2), dtype=torch.float32)
    with on_device(q):
        _attention_fwd_kernel[(triton.cdiv(rows, shape["BLOCK_M"]), batch * kv_heads, splits)](
            *(q, k, v, parts, sums),
            *(o.offsets, o.lengths, o.mask, o.sinks, o.alibi),
            *(*scalars, splits, *floats),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o_strides, *mask_strides(o)),
            **constants,
            PARTS=splits > 1,
            enable_fp_fusion=q.dtype != torch.float32,
            **shape,
        )
        if splits > 1:
            _attention_join_kernel[(batch * heads * length,)](
                *(parts, sums, out, lse, o.sinks, length, splits, *o_strides),
                HEADS=heads,
                HEAD_DIM=width,
                BLOCK_D=constants["BLOCK_D"],
                PARTS=next_power_of_2(splits),
                num_warps=4,
            )
    return out, lse
