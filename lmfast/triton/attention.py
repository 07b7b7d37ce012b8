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

On a cache, a tile of keys lies in one block of the table, so paging costs one load per tile; int8
keys are exact in the queries' dtype, and their scales are applied to scores and weights, not to
keys and values: one multiplication per score instead of one per element.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.ops._attention_reference import Options
from lmfast.ops._cached_attention_reference import TABLE_BLOCK, CacheOptions, attention_options
from lmfast.triton._attention_scores import (
    arguments,
    keys_for,
    mask_strides,
    row_start,
    rows_of,
    scores_of,
)
from lmfast.triton._launch import multiprocessors, next_power_of_2, on_device

# More rows than this fill the multiprocessors without cutting the keys into parts.
_MOST_ROWS_TO_SPLIT = 64
_LEAST_KEYS_PER_PART = 256
_TABLE_BLOCK = tl.constexpr(TABLE_BLOCK)


class Storage(NamedTuple):
    """Where keys and values lie in a cache: ``cached_attention``'s arguments."""

    table: Tensor | None = None  # (B, blocks) int32
    key_scales: Tensor | None = None  # (R, Hkv, C) float32
    value_scales: Tensor | None = None

    def strides(self) -> tuple[int, ...]:
        """Of a table row, then of the storage row and head of either scale."""
        table = 0 if self.table is None else self.table.stride(0)
        scales = (self.key_scales, self.value_scales)
        return table, *(s for t in scales for s in ((0, 0) if t is None else t.stride()[:2]))


@triton.jit(do_not_specialize=["offset", "length", "keys", "window", "splits", "stored_rows"])
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
    table_ptr,
    key_scales_ptr,
    value_scales_ptr,
    offset,
    length,
    keys,
    window,
    splits,
    stored_rows,
    softcap,
    scale,
    mask_lowest,
    table0,
    ks0,
    ks1,
    vs0,
    vs1,
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
    rows = length * GROUP
    # One axis for tiles, heads and batch: the others end at 65,535.
    tiles = tl.cdiv(rows, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = pair % kv_heads
    part = tl.program_id(1)
    start, limit = row_start(offset, offsets_ptr, lengths_ptr, batch, length, keys, AFTER_LENGTHS)

    first = tl.program_id(0) % tiles * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = start + token
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None]
    q_mask = inside & (d < HEAD_DIM)[None, :]
    q = tl.load(rows_of(q_ptr, batch, head, token, q0, q1, q2, d), mask=q_mask, other=0.0)
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
    low, high = keys_for(
        start, first, length, limit, window, GROUP, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    if PARTS:
        per_part = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), splits) * BLOCK_N
        low = low + part * per_part
        high = tl.minimum(high, low + per_part)

    log2_e: tl.constexpr = 1.4426950408889634
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(low, high, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        kv_mask = (key < limit)[:, None] & (d < HEAD_DIM)[None, :]
        stored = batch
        if table_ptr is not None:
            # A tile lies in one block of the table. A storage row that does not exist gives NaN.
            entry = tl.load(table_ptr + batch * table0 + begin // _TABLE_BLOCK)
            known = (entry >= 0) & (entry < stored_rows)
            stored = tl.where(known, entry, 0).to(tl.int64)
        k = tl.load(rows_of(k_ptr, stored, kv_head, key, k0, k1, k2, d), mask=kv_mask, other=0.0)
        k = k.to(q.dtype)
        key_scale = None
        if key_scales_ptr is not None:
            at = stored * ks0 + kv_head.to(tl.int64) * ks1 + key
            key_scale = tl.load(key_scales_ptr + at, mask=key < limit, other=0.0)
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
            key_scale,
        )
        if table_ptr is not None:
            s = tl.where(known, s, float("nan"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        v = tl.load(rows_of(v_ptr, stored, kv_head, key, v0, v1, v2, d), mask=kv_mask, other=0.0)
        v = v.to(q.dtype)
        correction = tl.exp2(top - shift)
        if value_scales_ptr is not None:
            at = stored * vs0 + kv_head.to(tl.int64) * vs1 + key
            value_scale = tl.load(value_scales_ptr + at, mask=key < limit, other=0.0)
            total = total * correction + tl.sum(p, axis=1)
            p = (p * value_scale[None, :]).to(q.dtype)
        else:
            p = p.to(q.dtype)
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
        seen = total != 0  # also of NaN
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
        o_ptr = rows_of(out_ptr, batch, head, token, o0, o1, o2, d)
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
    # A part with a NaN has no maximum, but a NaN for its sum.
    seen = (shift > float("-inf")) | (tl.sum(tl.where(total == total, 0, 1), axis=0) > 0)
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
        # With four warps the accumulator of 128 numbers a row spills 72 bytes a thread.
        size = next_power_of_2(q.shape[3])
        block = 64 if size <= 64 else 32 if size <= 128 else 16
        return {"BLOCK_M": block, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {
        "BLOCK_M": 64 if wide else 128,
        "BLOCK_N": 32 if wide else 64,
        "num_warps": 4 if wide else 8,
        "num_stages": 2 if wide else 3,
    }


def attend(q: Tensor, k: Tensor, v: Tensor, o: Options, storage: Storage) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: (out, log-sum-exp in base 2)."""
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
        _attention_fwd_kernel[(tiles, splits)](
            *(q, k, v, parts, sums),
            *(o.offsets, o.lengths, o.mask, o.sinks, o.alibi, *storage),
            *(*scalars, splits, k.shape[0], *floats, *storage.strides()),
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


def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; the arguments of ``lmfast::attention``."""
    return attend(q, k, v, Options(*options), Storage())


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Launches the forward kernel on a cache; the arguments of ``lmfast::cached_attention``."""
    scale = 1.0 / math.sqrt(max(1, q.shape[3])) if scale is None else scale
    cache = CacheOptions(None, None, None, window or 0, softcap or 0.0, sinks, alibi, scale)
    options = attention_options(lengths, cache)
    return attend(q, keys, values, options, Storage(table, key_scales, value_scales))[0]
