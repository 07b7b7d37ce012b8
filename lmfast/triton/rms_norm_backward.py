"""RMSNorm backward for NVIDIA GPUs, also of add + RMSNorm.

Floor: bytes. x and dy (and dsum) are read and dx is written once, up to `_BWD_BLOCK` columns;
longer rows are walked twice, the second time from the L2 cache.

Weight gradients: a fixed number of programs each walks its rows in order and leaves one partial
row; a second kernel adds the partial rows in order. No atomics, hence the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import multiprocessors, next_power_of_2, on_device
from lmfast.triton.rms_norm import (
    LOOP_BLOCK,
    TILE,
    count_rows,
    row_layout,
    row_offset,
    warps_for,
)

# Largest row held in registers, three times: x, dy and the running weight gradient.
_BWD_BLOCK = 8192


@triton.jit(do_not_specialize=["rows", "steps", "size1", "size2"])
def _rms_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dsum_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    steps,
    width,
    eps,
    size1,
    size2,
    g0,
    g1,
    g2,
    x0,
    x1,
    x2,
    s0,
    s1,
    s2,
    d0,
    d1,
    d2,
    NDIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    eps = tl.full([], eps, tl.float32)
    col = tl.arange(0, BLOCK)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    # Loads of the next rows are under way while these are worked on: with one or two programs per
    # multiprocessor nothing else would hide their latency.
    for step in tl.range(0, steps, num_stages=STAGES):
        row = (step * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        at = row_offset(row, size1, size2, x0, x1, x2, NDIM)[:, None] + col[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = row_offset(row, size1, size2, g0, g1, g2, NDIM)[:, None] + col[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
        x *= scale
        if partial_ptr is not None:
            dweight += dy * x
        if weight_ptr is not None:
            dy *= w
        dx = scale * (dy - x * (tl.sum(dy * x, axis=1) / width)[:, None])
        if dsum_ptr is not None:
            at = row_offset(row, size1, size2, s0, s1, s2, NDIM)[:, None] + col[None, :]
            dx += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = row_offset(row, size1, size2, d0, d1, d2, NDIM)[:, None] + col[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        at = program.to(tl.int64) * width + col
        tl.store(partial_ptr + at, tl.sum(dweight, axis=0), mask=col < width)


@triton.jit(do_not_specialize=["rows", "steps", "size1", "size2"])
def _rms_norm_bwd_loop_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dsum_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    steps,
    width,
    eps,
    size1,
    size2,
    g0,
    g1,
    g2,
    x0,
    x1,
    x2,
    s0,
    s1,
    s2,
    d0,
    d1,
    d2,
    NDIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    eps = tl.full([], eps, tl.float32)
    for step in range(0, steps):
        row = step * tl.num_programs(0) + program
        end = tl.where(row < rows, width, 0)
        x_row = x_ptr + row_offset(row, size1, size2, x0, x1, x2, NDIM)
        dy_row = dy_ptr + row_offset(row, size1, size2, g0, g1, g2, NDIM)
        dx_row = dx_ptr + row_offset(row, size1, size2, d0, d1, d2, NDIM)
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask = col < end
            x = tl.load(x_row + col, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_row + col, mask=mask, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
            squares += x * x
            products += dy * x
        scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        slope = scale * tl.sum(products, axis=0) / width
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask = col < end
            x = tl.load(x_row + col, mask=mask, other=0.0).to(tl.float32) * scale
            dy = tl.load(dy_row + col, mask=mask, other=0.0).to(tl.float32)
            if partial_ptr is not None:
                # This program's own partial row, started by its first row.
                at = partial_ptr + program.to(tl.int64) * width + col
                before = tl.load(at, mask=mask & (step > 0), other=0.0)
                tl.store(at, before + dy * x, mask=mask)
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
            dx = scale * (dy - x * slope)
            if dsum_ptr is not None:
                dsum_row = dsum_ptr + row_offset(row, size1, size2, s0, s1, s2, NDIM)
                dx += tl.load(dsum_row + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_row + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _add_partial_rows_kernel(
    partial_ptr, out_ptr, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (col < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + col, result, mask=col < width)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dsum: Tensor | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernels; the arguments of ``lmfast::rms_norm_backward``."""
    dx = torch.empty_like(x)
    like = weight if need_dweight else None
    rows, width = count_rows(x), x.shape[-1]
    if rows == 0:
        return dx, x.new_empty(0) if like is None else torch.zeros_like(like)
    ndim, size1, size2, strides = row_layout(dy, x, x if dsum is None else dsum, dx)
    block = next_power_of_2(width)
    tile_rows = max(1, TILE // block)
    tile = min(tile_rows * block, _BWD_BLOCK)
    # Enough elements per multiprocessor to cover the memory's latency with two tiles in flight,
    # few enough programs that their partial rows stay in the L2 cache.
    blocks = triton.cdiv(rows, tile_rows)
    programs = min(blocks, multiprocessors(x.device) * max(1, _BWD_BLOCK // tile))
    steps = triton.cdiv(blocks, programs)
    partial = None
    if like is not None:
        partial = x.new_empty((programs, width), dtype=torch.float32)
    dweight = x.new_empty(0) if like is None else torch.empty_like(like)
    pointers = (dy, x, weight, dsum, dx, partial)
    with on_device(x):
        if block > _BWD_BLOCK:
            _rms_norm_bwd_loop_kernel[(programs,)](
                *pointers,
                *(rows, steps, width, eps, size1, size2, *strides),
                NDIM=ndim,
                BLOCK=LOOP_BLOCK,
                num_warps=warps_for(LOOP_BLOCK),
            )
        else:
            _rms_norm_bwd_kernel[(programs,)](
                *pointers,
                *(rows, steps, width, eps, size1, size2, *strides),
                NDIM=ndim,
                ROWS=tile_rows,
                BLOCK=block,
                STAGES=2 if tile * x.element_size() > 16384 else 3,
                num_warps=warps_for(tile),
            )
        if partial is not None:
            _add_partial_rows_kernel[(triton.cdiv(width, 32),)](
                partial, dweight, programs, width, ROWS=64, BLOCK=32, num_warps=4
            )
    return dx, dweight
