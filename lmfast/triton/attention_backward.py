"""Attention backward for NVIDIA GPUs: gradients of q, then of k and v, without atomics.

Floor: 10 T S H D operations on the matrix units, 2.5 times the forward; the scores are computed
again in both kernels (14 T S H D), which is what it costs that no (T, S) matrix is stored and that
every sum has one owner, hence the same bits every run. In fp32 the compiler may not fuse the
subtraction of the log-sum-exp with the scaling before it: that would keep digits of one side only,
which shows when scores are large. The first kernel also leaves, per query, the
product of the output with its gradient, which the second one needs. Rows are packed as forward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.ops._attention_reference import Options
from lmfast.triton._attention_scores import (
    arguments,
    keys_for,
    mask_strides,
    row_start,
    rows_of,
    scores_of,
)
from lmfast.triton._launch import next_power_of_2, on_device


@triton.jit(do_not_specialize=["offset", "length", "keys", "window"])
def _attention_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    offsets_ptr,
    lengths_ptr,
    mask_ptr,
    alibi_ptr,
    offset,
    length,
    keys,
    window,
    softcap,
    scale,
    mask_lowest,
    g0,
    g1,
    g2,
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
    d0,
    d1,
    d2,
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
    DOT_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv_heads: tl.constexpr = HEADS // GROUP
    tiles = tl.cdiv(length * GROUP, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    start, limit = row_start(offset, offsets_ptr, lengths_ptr, batch, length, keys, AFTER_LENGTHS)
    first = tl.program_id(0) % tiles * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    there = row < length * GROUP
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = start + token
    d = tl.arange(0, BLOCK_D)
    inside = there[:, None]
    row_mask = inside & (d < HEAD_DIM)[None, :]
    q = tl.load(rows_of(q_ptr, batch, head, token, q0, q1, q2, d), mask=row_mask, other=0.0)
    dout = tl.load(rows_of(dout_ptr, batch, head, token, g0, g1, g2, d), mask=row_mask, other=0.0)
    out = tl.load(rows_of(out_ptr, batch, head, token, o0, o1, o2, d), mask=row_mask, other=0.0)
    sum_at = (batch * HEADS + head) * length + token
    lse = tl.load(lse_ptr + sum_at, mask=there, other=float("inf"))
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + sum_at, delta, mask=there)
    if DOT_FP32:
        q, dout = q.to(tl.float32), dout.to(tl.float32)
    slope = None
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + head, mask=there, other=0.0)
    mask_row = None
    if mask_ptr is not None:
        mask_row = mask_ptr + (batch * m0 + head * m1 + token.to(tl.int64) * m2)[:, None]

    low, high = keys_for(
        start, first, length, limit, window, GROUP, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(low, high, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        kv_mask = (key < limit)[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(rows_of(k_ptr, batch, kv_head, key, k0, k1, k2, d), mask=kv_mask, other=0.0)
        v = tl.load(rows_of(v_ptr, batch, kv_head, key, v0, v1, v2, d), mask=kv_mask, other=0.0)
        if DOT_FP32:
            k, v = k.to(tl.float32), v.to(tl.float32)
        s, slope_of_cap = scores_of(
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
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= slope_of_cap
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="tf32x3")
    dq = (acc * scale).to(dq_ptr.dtype.element_ty)
    tl.store(rows_of(dq_ptr, batch, head, token, d0, d1, d2, d), dq, mask=row_mask)


@triton.jit(do_not_specialize=["offset", "length", "keys", "window"])
def _attention_dkv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    offsets_ptr,
    lengths_ptr,
    mask_ptr,
    alibi_ptr,
    offset,
    length,
    keys,
    window,
    softcap,
    scale,
    mask_lowest,
    g0,
    g1,
    g2,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    v0,
    v1,
    v2,
    dk0,
    dk1,
    dk2,
    dv0,
    dv1,
    dv2,
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
    DOT_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv_heads: tl.constexpr = HEADS // GROUP
    tiles = tl.cdiv(keys, BLOCK_N)
    pair = tl.program_id(0) // tiles
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    start, limit = row_start(offset, offsets_ptr, lengths_ptr, batch, length, keys, AFTER_LENGTHS)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    kv_mask = (key < limit)[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(rows_of(k_ptr, batch, kv_head, key, k0, k1, k2, d), mask=kv_mask, other=0.0)
    v = tl.load(rows_of(v_ptr, batch, kv_head, key, v0, v1, v2, d), mask=kv_mask, other=0.0)
    if DOT_FP32:
        k, v = k.to(tl.float32), v.to(tl.float32)

    # The tokens that may see some key of the tile.
    low, high = 0, length
    if CAUSAL:
        low = tl.maximum(low, first_key - start)
    if WINDOW:
        high = tl.minimum(high, first_key + BLOCK_N - 1 + window - start)
        if not CAUSAL:
            low = tl.maximum(low, first_key - window + 1 - start)
    if first_key >= limit:
        high = low
    low = low * GROUP // BLOCK_M * BLOCK_M
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for begin in range(low, high * GROUP, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        there = row < length * GROUP
        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        position = start + token
        inside = there[:, None]
        row_mask = inside & (d < HEAD_DIM)[None, :]
        q = tl.load(rows_of(q_ptr, batch, head, token, q0, q1, q2, d), mask=row_mask, other=0.0)
        dout = tl.load(
            rows_of(dout_ptr, batch, head, token, g0, g1, g2, d), mask=row_mask, other=0.0
        )
        if DOT_FP32:
            q, dout = q.to(tl.float32), dout.to(tl.float32)
        sum_at = (batch * HEADS + head) * length + token
        lse = tl.load(lse_ptr + sum_at, mask=there, other=float("inf"))
        delta = tl.load(delta_ptr + sum_at, mask=there, other=0.0)
        slope = None
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + head, mask=there, other=0.0)
        mask_row = None
        if mask_ptr is not None:
            mask_row = mask_ptr + (batch * m0 + head * m1 + token.to(tl.int64) * m2)[:, None]
        s, slope_of_cap = scores_of(
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
        p = tl.exp2(s - lse[:, None])
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision="tf32x3")
        dp = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= slope_of_cap
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="tf32x3")
    kv_mask = (key < keys)[:, None] & (d < HEAD_DIM)[None, :]
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(rows_of(dk_ptr, batch, kv_head, key, dk0, dk1, dk2, d), dk, mask=kv_mask)
    dv = dv.to(dv_ptr.dtype.element_ty)
    tl.store(rows_of(dv_ptr, batch, kv_head, key, dv0, dv1, dv2, d), dv, mask=kv_mask)


def _tile(q: Tensor) -> dict[str, int]:
    """Both accumulators of the second kernel are (keys, head size): they set the sizes."""
    size = next_power_of_2(q.shape[3])
    if q.dtype == torch.float32:
        # Tiles of 32 spill 60 bytes a thread from heads of 128 on. Heads of 256 spill 150 in any
        # tile: 16 warps would 1,800, 4 warps 500.
        block = 32 if size <= 64 else 16
        warps = 4 if size == 128 else 8
        return {"BLOCK_M": block, "BLOCK_N": block, "num_warps": warps, "num_stages": 1}
    if size > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4 if size <= 64 else 8, "num_stages": 2}


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernels; the arguments of ``lmfast::attention_backward``."""
    o = Options(*options)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    batch, heads, length = q.shape[:3]
    kv_heads, keys = k.shape[1], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    shape = _tile(q)
    (scalars, floats), constants = arguments(o, q, k)
    delta = torch.empty_like(lse)
    inputs = (o.offsets, o.lengths, o.mask, o.alibi)
    rows = length * heads // kv_heads
    in_strides = [s for t in (dout, q, k, v) for s in t.stride()[:3]]
    with on_device(q):
        _attention_dq_kernel[(triton.cdiv(rows, shape["BLOCK_M"]) * batch * kv_heads,)](
            *(dout, q, k, v, out, lse, delta, dq),
            *(*inputs, *scalars, *floats),
            *(*in_strides, *out.stride()[:3], *dq.stride()[:3], *mask_strides(o)),
            **constants,
            **shape,
            enable_fp_fusion=q.dtype != torch.float32,
        )
        _attention_dkv_kernel[(triton.cdiv(keys, shape["BLOCK_N"]) * batch * kv_heads,)](
            *(dout, q, k, v, lse, delta, dk, dv),
            *(*inputs, *scalars, *floats),
            *(*in_strides, *dk.stride()[:3], *dv.stride()[:3], *mask_strides(o)),
            **constants,
            **shape,
            enable_fp_fusion=q.dtype != torch.float32,
        )
    return dq, dk, dv
