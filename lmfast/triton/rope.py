"""Rotary position embedding of queries and keys in one launch, for NVIDIA GPUs.

Floor: bytes. q and k are read and written once; the tables are small and shared by all heads. A
program rotates a tile of tokens x heads, so each row of the tables is read once per tile and not
once per head, and both memory orders, (B, H, T, D) and (B, T, H, D), are read in long runs.
Interleaved pairs are loaded as they lie and split in registers: loading them with stride 2 would
halve every access. The backward is the rotation by the opposite angle. In place, an element is
read and written by the same thread, reads first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import next_power_of_2, on_device

# Pairs per program: 4 warps then rotate 16 pairs per thread, two loads of 16 bytes in 16 bits.
_PAIRS = 2048


@triton.jit
def load_pairs(ptr, at, mask, rotary, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """First and second elements of the pairs of heads that begin at ``at``, in fp32.

    ``at`` and ``mask`` are (tokens, heads, 1), the results (tokens, heads, PAIRS).
    """
    if INTERLEAVED:
        d = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.load(ptr + at + d, mask=mask & (d < rotary), other=0.0).to(tl.float32)
        a, b = tl.split(x.reshape(x.shape[0], x.shape[1], PAIRS, 2))
    else:
        half = rotary // 2
        d = tl.arange(0, PAIRS)[None, None, :]
        a = tl.load(ptr + at + d, mask=mask & (d < half), other=0.0).to(tl.float32)
        b = tl.load(ptr + at + half + d, mask=mask & (d < half), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(ptr, at, mask, a, b, rotary, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """Stores what ``load_pairs`` loads."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if INTERLEAVED:
        d = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.join(a, b).reshape(a.shape[0], a.shape[1], 2 * PAIRS)
        tl.store(ptr + at + d, x.to(dtype), mask=mask & (d < rotary))
    else:
        half = rotary // 2
        d = tl.arange(0, PAIRS)[None, None, :]
        tl.store(ptr + at + d, a.to(dtype), mask=mask & (d < half))
        tl.store(ptr + at + half + d, b.to(dtype), mask=mask & (d < half))


@triton.jit
def angles_at(
    cos_ptr, sin_ptr, position, table_rows, rotary, INVERSE: tl.constexpr, PAIRS: tl.constexpr
):
    """Cosines and sines of tokens, (tokens, 1, PAIRS), and which tokens the tables know.

    A row past the tables becomes NaN: the host cannot look at positions without waiting for them.
    """
    valid = (position >= 0) & (position < table_rows)
    pair = tl.arange(0, PAIRS)
    half = rotary // 2
    at = (position * half)[:, None] + pair[None, :]
    known = valid[:, None] & (pair < half)[None, :]
    cos = tl.load(cos_ptr + at, mask=known, other=float("nan"))[:, None, :]
    sin = tl.load(sin_ptr + at, mask=known, other=float("nan"))[:, None, :]
    if INVERSE:
        sin = -sin
    return cos, sin, valid


@triton.jit
def _rotate_tile(
    in_ptr,
    out_ptr,
    cos,
    sin,
    valid,
    source,
    target,
    mask,
    head_dim,
    rotary,
    INTERLEAVED: tl.constexpr,
    INPLACE: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
):
    a, b = load_pairs(in_ptr, source, mask, rotary, INTERLEAVED, PAIRS)
    first, second = a * cos - b * sin, a * sin + b * cos
    store_pairs(out_ptr, target, mask, first, second, rotary, INTERLEAVED, PAIRS)
    if TAIL > 0:
        d = rotary + tl.arange(0, TAIL)[None, None, :]
        mask = mask & (d < head_dim)
        if not INPLACE:
            x = tl.load(in_ptr + source + d, mask=mask, other=0.0)
            tl.store(out_ptr + target + d, x, mask=mask)
        nan = tl.full([1, 1, TAIL], float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + target + d, nan, mask=mask & (valid == 0)[:, None, None])


@triton.jit
def tile_offsets(token, head, token_stride, head_stride):
    """(tokens, heads, 1): where heads begin."""
    token, head = token.to(tl.int64) * token_stride, head.to(tl.int64) * head_stride
    return token[:, None, None] + head[None, :, None]


@triton.jit(do_not_specialize=["offset", "length", "table_rows", "q_blocks", "q_heads", "k_heads"])
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    offset,
    length,
    table_rows,
    q_heads,
    k_heads,
    q_blocks,
    head_dim,
    rotary,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    qo0,
    qo1,
    qo2,
    ko0,
    ko1,
    ko2,
    PER_TOKEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    INPLACE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
):
    token_blocks = tl.cdiv(length, TOKENS)
    batch = (tl.program_id(0) // token_blocks).to(tl.int64)
    token = (tl.program_id(0) % token_blocks) * TOKENS + tl.arange(0, TOKENS)
    if positions_ptr is None:
        position = offset + token.to(tl.int64)
    elif PER_TOKEN:
        position = tl.load(positions_ptr + batch * length + token, mask=token < length, other=0)
    else:
        position = tl.load(positions_ptr + batch) + token
    cos, sin, valid = angles_at(cos_ptr, sin_ptr, position, table_rows, rotary, INVERSE, PAIRS)
    there = (token < length)[:, None, None]
    block = tl.program_id(1)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        _rotate_tile(
            q_ptr + batch * q0,
            q_out_ptr + batch * qo0,
            cos,
            sin,
            valid,
            tile_offsets(token, head, q2, q1),
            tile_offsets(token, head, qo2, qo1),
            there & (head < q_heads)[None, :, None],
            head_dim,
            rotary,
            INTERLEAVED,
            INPLACE,
            PAIRS,
            TAIL,
        )
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        _rotate_tile(
            k_ptr + batch * k0,
            k_out_ptr + batch * ko0,
            cos,
            sin,
            valid,
            tile_offsets(token, head, k2, k1),
            tile_offsets(token, head, ko2, ko1),
            there & (head < k_heads)[None, :, None],
            head_dim,
            rotary,
            INTERLEAVED,
            INPLACE,
            PAIRS,
            TAIL,
        )


def tile(pairs: int, tokens: int, *heads: int) -> tuple[int, int]:
    """Tokens and heads of a program whose heads have as many pairs."""
    of_heads = next_power_of_2(min(max(1, h) for h in heads))
    of_heads = min(of_heads, max(1, _PAIRS // pairs))
    return min(next_power_of_2(tokens), max(1, _PAIRS // (pairs * of_heads))), of_heads


def _launch(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    batch, q_heads, length, head_dim = q.shape
    k_heads, rotary = k.shape[1], 2 * cos.shape[1]
    if batch * length * max(q_heads, k_heads) * head_dim == 0:
        return
    pairs = next_power_of_2(rotary // 2)
    tokens, heads = tile(pairs, length, q_heads, k_heads)
    q_blocks, k_blocks = triton.cdiv(q_heads, heads), triton.cdiv(k_heads, heads)
    with on_device(q):
        _rope_kernel[(batch * triton.cdiv(length, tokens), q_blocks + k_blocks)](
            *(q, k, q_out, k_out, cos, sin, positions),
            *(offset, length, cos.shape[0], q_heads, k_heads, q_blocks, head_dim, rotary),
            *(*q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3]),
            PER_TOKEN=positions is not None and positions.dim() == 2,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            INPLACE=q_out is q,
            TOKENS=tokens,
            HEADS=heads,
            PAIRS=pairs,
            TAIL=next_power_of_2(head_dim - rotary) if head_dim > rotary else 0,
            num_warps=4 if tokens * heads * pairs >= 512 else 1,
        )


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the rotation; the arguments of ``lmfast::rope``."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _launch(q, k, q_out, k_out, cos, sin, positions, offset, interleaved, inverse)
    return q_out, k_out


def rope_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
) -> None:
    """Launches the rotation in place; the arguments of ``lmfast::rope_``."""
    _launch(q, k, q, k, cos, sin, positions, offset, interleaved, False)
