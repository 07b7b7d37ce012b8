"""Rotary embedding of new queries and keys and storing in a cache, in one launch, for NVIDIA GPUs.

Floor: bytes; q is read and written once, k and v are read once and stored once. A program takes a
tile of tokens x heads of q, of k or of v: the three kinds lie side by side in the grid's second
dimension, so that decoding one token is one launch of a few programs. Keys and values go where
their slots say, from the tokens listed; int8 storage takes the largest element of a head from
registers. Eight-bit floats are rounded in integers and stored as bytes, so that every GPU, and the
interpreter, gives the same bits: a few operations per element of a kernel that waits for memory.
A slot or token outside its tensor is not stored, and a position past the tables gives
NaN: the host cannot look at them without waiting for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.ops._storage import FLOAT8
from lmfast.ops.rope_append import SMALLEST
from lmfast.triton._launch import next_power_of_2, on_device
from lmfast.triton.rope import angles_at, load_pairs, store_pairs, tile, tile_offsets

_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def _largest(x, mask):
    """(largest absolute value, 0 if all are finite) over the last dimension."""
    x = tl.where(mask, tl.abs(x), 0.0)
    unknown = tl.where(x <= 3.4028234663852886e38, 0, 1)
    return tl.max(x, axis=2), tl.max(unknown, axis=2)


@triton.jit
def _scale_of(top, unknown):
    """(scale, its inverse) of vectors with this largest value; NaN and 0 if one is not finite."""
    empty = top < _SMALLEST
    safe = tl.where(empty, 1.0, top)
    most = tl.full(safe.shape, 127.0, tl.float32)
    inverse = tl.where(empty | (unknown > 0), 0.0, tl.div_rn(most, safe))
    scale = tl.where(empty, 0.0, tl.div_rn(safe, most))
    return tl.where(unknown > 0, float("nan"), scale), inverse


@triton.jit
def _codes(x, inverse, unknown):
    """Nearest integers, halves to even: adding 1.5 * 2^23 leaves no digits behind the point."""
    x = tl.where((unknown > 0)[:, :, None], 0.0, x) * inverse[:, :, None]
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _float8_codes(x):
    """The bytes of float8_e4m3fn: nearest, halves to even, at most 448; for what is not finite NaN.

    From 2^-6 on the bits of fp32 are rounded to three of the fraction; smaller numbers are
    multiples of 2^-9.
    """
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((magnitude * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(magnitude < 0.015625, small, tl.minimum(normal, 0x7E))
    code |= (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(magnitude <= 3.4028234663852886e38, code, 0x7F)


@triton.jit
def _store_rotated(
    source_ptr,
    target_ptr,
    scales_ptr,
    source,
    target,
    scale_at,
    mask,
    cos,
    sin,
    valid,
    head_dim,
    rotary,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
):
    a, b = load_pairs(source_ptr, source, mask, rotary, INTERLEAVED, PAIRS)
    first, second = a * cos - b * sin, a * sin + b * cos
    if TAIL > 0:
        d = rotary + tl.arange(0, TAIL)[None, None, :]
        tail_mask = mask & (d < head_dim)
        tail = tl.load(source_ptr + source + d, mask=tail_mask, other=0.0).to(tl.float32)
        tail = tl.where(valid[:, None, None], tail, float("nan"))
    if scales_ptr is not None:
        pair_mask = mask & (tl.arange(0, PAIRS) < rotary // 2)[None, None, :]
        top, unknown = _largest(first, pair_mask)
        top2, unknown2 = _largest(second, pair_mask)
        top, unknown = tl.maximum(top, top2), tl.maximum(unknown, unknown2)
        if TAIL > 0:
            top2, unknown2 = _largest(tail, tail_mask)
            top, unknown = tl.maximum(top, top2), tl.maximum(unknown, unknown2)
        scale, inverse = _scale_of(top, unknown)
        tl.store(scales_ptr + scale_at, scale[:, :, None], mask=mask)
        first, second = _codes(first, inverse, unknown), _codes(second, inverse, unknown)
        if TAIL > 0:
            tail = _codes(tail, inverse, unknown)
    elif target_ptr.dtype.element_ty == tl.uint8:
        first, second = _float8_codes(first), _float8_codes(second)
        if TAIL > 0:
            tail = _float8_codes(tail)
    store_pairs(target_ptr, target, mask, first, second, rotary, INTERLEAVED, PAIRS)
    if TAIL > 0:
        tl.store(target_ptr + target + d, tail.to(target_ptr.dtype.element_ty), mask=tail_mask)


@triton.jit
def _store_plain(
    source_ptr,
    target_ptr,
    scales_ptr,
    source,
    target,
    scale_at,
    mask,
    head_dim,
    WIDTH: tl.constexpr,
):
    d = tl.arange(0, WIDTH)[None, None, :]
    whole = mask & (d < head_dim)
    x = tl.load(source_ptr + source + d, mask=whole, other=0.0).to(tl.float32)
    if scales_ptr is not None:
        top, unknown = _largest(x, whole)
        scale, inverse = _scale_of(top, unknown)
        tl.store(scales_ptr + scale_at, scale[:, :, None], mask=mask)
        x = _codes(x, inverse, unknown)
    elif target_ptr.dtype.element_ty == tl.uint8:
        x = _float8_codes(x)
    tl.store(target_ptr + target + d, x.to(target_ptr.dtype.element_ty), mask=whole)


@triton.jit(
    do_not_specialize=[
        "all_tokens",
        "count",
        "offset",
        "length",
        "table_rows",
        "stored_rows",
        "capacity",
        "q_heads",
        "kv_heads",
        "q_blocks",
        "kv_blocks",
    ]
)
def _rope_append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,
    tokens_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    all_tokens,
    count,
    offset,
    length,
    table_rows,
    stored_rows,
    capacity,
    q_heads,
    kv_heads,
    q_blocks,
    kv_blocks,
    head_dim,
    rotary,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    v0,
    v1,
    v2,
    keys0,
    keys1,
    keys2,
    values0,
    values1,
    values2,
    ks0,
    ks1,
    ks2,
    vs0,
    vs1,
    vs2,
    PER_TOKEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(1)
    there = token < all_tokens
    row, column = token, token
    if block >= q_blocks:
        listed = token < count
        slot = tl.load(slots_ptr + token, mask=listed, other=-1)
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + token, mask=listed, other=-1)
        there = (slot >= 0) & (slot < stored_rows.to(tl.int64) * capacity)
        there = there & (token >= 0) & (token < all_tokens)
        row, column = slot // capacity, slot % capacity
    batch, step = token // length, token % length
    head = (block - q_blocks) % kv_blocks * HEADS + tl.arange(0, HEADS)
    heads = kv_heads
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        heads = q_heads
    mask = (there[:, None] & (head < heads)[None, :])[:, :, None]
    if block >= q_blocks + kv_blocks:
        _store_plain(
            v_ptr,
            values_ptr,
            value_scales_ptr,
            (batch * v0)[:, None, None] + tile_offsets(step, head, v2, v1),
            (row * values0)[:, None, None] + tile_offsets(column, head, values2, values1),
            (row * vs0)[:, None, None] + tile_offsets(column, head, vs2, vs1),
            mask,
            head_dim,
            WIDTH,
        )
    elif cos_ptr is None:
        _store_plain(
            k_ptr,
            keys_ptr,
            key_scales_ptr,
            (batch * k0)[:, None, None] + tile_offsets(step, head, k2, k1),
            (row * keys0)[:, None, None] + tile_offsets(column, head, keys2, keys1),
            (row * ks0)[:, None, None] + tile_offsets(column, head, ks2, ks1),
            mask,
            head_dim,
            WIDTH,
        )
    else:
        if positions_ptr is None:
            position = offset + step
        elif PER_TOKEN:
            position = tl.load(positions_ptr + token, mask=there, other=0)
        else:
            position = tl.load(positions_ptr + batch, mask=there, other=0) + step
        cos, sin, valid = angles_at(cos_ptr, sin_ptr, position, table_rows, rotary, False, PAIRS)
        if block < q_blocks:
            at = (batch * q0)[:, None, None] + tile_offsets(step, head, q2, q1)
            _store_rotated(
                q_ptr,
                q_ptr,
                None,
                at,
                at,
                at,
                mask,
                cos,
                sin,
                valid,
                head_dim,
                rotary,
                INTERLEAVED,
                PAIRS,
                TAIL,
            )
        else:
            _store_rotated(
                k_ptr,
                keys_ptr,
                key_scales_ptr,
                (batch * k0)[:, None, None] + tile_offsets(step, head, k2, k1),
                (row * keys0)[:, None, None] + tile_offsets(column, head, keys2, keys1),
                (row * ks0)[:, None, None] + tile_offsets(column, head, ks2, ks1),
                mask,
                cos,
                sin,
                valid,
                head_dim,
                rotary,
                INTERLEAVED,
                PAIRS,
                TAIL,
            )


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    slots: Tensor,
    tokens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
) -> None:
    """Launches the kernel; the arguments of ``lmfast::rope_append``."""
    batch, q_heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    if batch * length * head_dim == 0:
        return
    if keys.dtype == FLOAT8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    rotary = 0 if cos is None else 2 * cos.shape[1]
    width = next_power_of_2(head_dim)
    of_q = q_heads if rotary else 0
    of_tokens, of_heads = tile(max(1, width // 2), batch * length, *filter(None, (of_q, kv_heads)))
    q_blocks, kv_blocks = triton.cdiv(of_q, of_heads), triton.cdiv(kv_heads, of_heads)
    if q_blocks + kv_blocks == 0:
        return
    grid = (triton.cdiv(batch * length, of_tokens), q_blocks + 2 * kv_blocks)
    scale_strides = (
        s for t in (key_scales, value_scales) for s in ((0, 0, 0) if t is None else t.stride())
    )
    with on_device(q):
        _rope_append_kernel[grid](
            *(q, k, v, keys, values, key_scales, value_scales, slots, tokens),
            *((cos, sin, positions) if rotary else (None, None, None)),
            *(batch * length, slots.shape[0], offset, length, 0 if cos is None else cos.shape[0]),
            *(keys.shape[0], keys.shape[2], of_q, kv_heads, q_blocks, max(1, kv_blocks)),
            *(head_dim, rotary, *(s for t in (q, k, v, keys, values) for s in t.stride()[:3])),
            *scale_strides,
            PER_TOKEN=positions is not None and positions.dim() == 2,
            INTERLEAVED=interleaved,
            TOKENS=of_tokens,
            HEADS=of_heads,
            PAIRS=next_power_of_2(max(1, rotary // 2)),
            TAIL=next_power_of_2(head_dim - rotary) if head_dim > rotary else 0,
            WIDTH=width,
            num_warps=4 if of_tokens * of_heads * width >= 1024 else 1,
        )
