"""RMSNorm and add + RMSNorm, forward and backward, for NVIDIA GPUs.

Floor: bytes. Forward reads x (and residual) and writes y (and the sum) once; backward reads x and
dy (and dsum) and writes dx once. A row stays in registers between its sum of squares and its
output, so nothing is read twice up to `_FWD_BLOCK` (forward) and `_BWD_BLOCK` (backward) columns;
longer rows are walked twice, the second time from the L2 cache.

Weight gradients: a fixed number of programs each walks its rows in order and leaves one partial
row; a second kernel adds the partial rows in order. No atomics, hence the same bits every run.
Rows are found through strides of up to three merged leading dimensions: a (B, T, H, D) tensor seen
as (B, H, T, D) is read where it lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import multiprocessors, next_power_of_2, on_device

# Largest rows held in registers. Above, the compiler reports spills for sm_90: forward keeps one
# row per program, backward three (x, dy and the running weight gradient).
_FWD_BLOCK = 16384
_BWD_BLOCK = 8192
_LOOP_BLOCK = 4096
# Short rows share a program: it then has this many elements and keeps 16 bytes per thread and load.
_TILE = 2048


@triton.jit
def _offset(row, size1, size2, stride0, stride1, stride2, NDIM: tl.constexpr):
    row = row.to(tl.int64)
    if NDIM == 1:
        return row * stride2
    outer = row // size2
    offset = (row % size2) * stride2
    if NDIM == 2:
        return offset + outer * stride1
    return offset + (outer % size1) * stride1 + (outer // size1) * stride0


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def _rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rows,
    width,
    eps,
    size1,
    size2,
    x0,
    x1,
    x2,
    r0,
    r1,
    r2,
    y0,
    y1,
    y2,
    s0,
    s1,
    s2,
    NDIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    at = _offset(row, size1, size2, x0, x1, x2, NDIM)[:, None] + col[None, :]
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        at = _offset(row, size1, size2, r0, r1, r2, NDIM)[:, None] + col[None, :]
        h += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = h.to(sum_ptr.dtype.element_ty)
        at = _offset(row, size1, size2, s0, s1, s2, NDIM)[:, None] + col[None, :]
        tl.store(sum_ptr + at, total, mask=mask)
        h = total.to(tl.float32)
    mean = tl.sum(h * h, axis=1) / width
    h *= tl.rsqrt(mean + tl.full([], eps, tl.float32))[:, None]
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    at = _offset(row, size1, size2, y0, y1, y2, NDIM)[:, None] + col[None, :]
    tl.store(y_ptr + at, h.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size1", "size2"])
def _rms_norm_fwd_loop_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    width,
    eps,
    size1,
    size2,
    x0,
    x1,
    x2,
    r0,
    r1,
    r2,
    y0,
    y1,
    y2,
    s0,
    s1,
    s2,
    NDIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += _offset(row, size1, size2, x0, x1, x2, NDIM)
    y_ptr += _offset(row, size1, size2, y0, y1, y2, NDIM)
    if residual_ptr is not None:
        residual_ptr += _offset(row, size1, size2, r0, r1, r2, NDIM)
        sum_ptr += _offset(row, size1, size2, s0, s1, s2, NDIM)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            h += tl.load(residual_ptr + col, mask=col < width, other=0.0).to(tl.float32)
            h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
        squares += h * h
    scale = tl.rsqrt(tl.sum(squares, axis=0) / width + tl.full([], eps, tl.float32))
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            h += tl.load(residual_ptr + col, mask=col < width, other=0.0).to(tl.float32)
            total = h.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + col, total, mask=col < width)
            h = total.to(tl.float32)
        h *= scale
        if weight_ptr is not None:
            h *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(y_ptr + col, h.to(y_ptr.dtype.element_ty), mask=col < width)


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
        at = _offset(row, size1, size2, x0, x1, x2, NDIM)[:, None] + col[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = _offset(row, size1, size2, g0, g1, g2, NDIM)[:, None] + col[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
        x *= scale
        if partial_ptr is not None:
            dweight += dy * x
        if weight_ptr is not None:
            dy *= w
        dx = scale * (dy - x * (tl.sum(dy * x, axis=1) / width)[:, None])
        if dsum_ptr is not None:
            at = _offset(row, size1, size2, s0, s1, s2, NDIM)[:, None] + col[None, :]
            dx += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = _offset(row, size1, size2, d0, d1, d2, NDIM)[:, None] + col[None, :]
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
        inside = row < rows
        x_row = x_ptr + _offset(row, size1, size2, x0, x1, x2, NDIM)
        dy_row = dy_ptr + _offset(row, size1, size2, g0, g1, g2, NDIM)
        dx_row = dx_ptr + _offset(row, size1, size2, d0, d1, d2, NDIM)
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask = inside & (col < width)
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
            mask = inside & (col < width)
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
                dsum_row = dsum_ptr + _offset(row, size1, size2, s0, s1, s2, NDIM)
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


def _layout(*operands: Tensor) -> tuple[int, int, int, list[int]]:
    """(dimensions left, size1, size2, three strides per operand) after merging leading dimensions.

    Neighbouring dimensions merge where every operand steps through both evenly; contiguous
    tensors have one left, the most is three.
    """
    shape, sizes = operands[0].shape[:-1], []
    strides: list[list[int]] = [[] for _ in operands]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        steps = [t.stride(d) for t in operands]
        if sizes and all(s[-1] == step * size for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    if len(sizes) > 3:
        raise ValueError(f"more than 3 leading dimensions that cannot be merged: {tuple(shape)}")
    missing = 3 - len(sizes)
    padded = [1] * missing + sizes
    flat = [step for s in strides for step in [0] * missing + s]
    return max(1, len(sizes)), padded[1], padded[2], flat


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _warps(tile: int) -> int:
    return min(32, max(4, tile // 512))


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rows, width = _rows(x), x.shape[-1]
    if rows == 0:
        return y, total
    # Without a residual its strides are never used; x's keep the argument list one length.
    r, s = (x, x) if residual is None or total is None else (residual, total)
    ndim, size1, size2, strides = _layout(x, r, y, s)
    pointers = (x, residual, weight, y, total)
    block = next_power_of_2(width)
    with on_device(x):
        if block > _FWD_BLOCK:
            _rms_norm_fwd_loop_kernel[(rows,)](
                *pointers,
                *(width, eps, size1, size2, *strides),
                NDIM=ndim,
                BLOCK=_LOOP_BLOCK,
                num_warps=_warps(_LOOP_BLOCK),
            )
        else:
            tile_rows = max(1, _TILE // block)
            _rms_norm_fwd_kernel[(triton.cdiv(rows, tile_rows),)](
                *pointers,
                *(rows, width, eps, size1, size2, *strides),
                NDIM=ndim,
                ROWS=tile_rows,
                BLOCK=block,
                num_warps=_warps(tile_rows * block),
            )
    return y, total


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Launches the forward kernel; the arguments of ``lmfast::rms_norm``."""
    return _forward(x, None, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; the arguments of ``lmfast::add_rms_norm``."""
    y, total = _forward(x, residual, weight, eps)
    assert total is not None
    return y, total


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
    wanted = need_dweight and weight is not None
    rows, width = _rows(x), x.shape[-1]
    if rows == 0:
        return dx, torch.zeros_like(weight) if wanted else x.new_empty(0)
    ndim, size1, size2, strides = _layout(dy, x, x if dsum is None else dsum, dx)
    block = next_power_of_2(width)
    tile_rows = max(1, _TILE // block)
    tile = min(tile_rows * block, _BWD_BLOCK)
    # Enough elements per multiprocessor to cover the memory's latency with two tiles in flight,
    # few enough programs that their partial rows stay in the L2 cache.
    blocks = triton.cdiv(rows, tile_rows)
    programs = min(blocks, multiprocessors(x.device) * max(1, _BWD_BLOCK // tile))
    steps = triton.cdiv(blocks, programs)
    partial = x.new_empty((programs, width), dtype=torch.float32) if wanted else None
    dweight = torch.empty_like(weight) if wanted else x.new_empty(0)
    pointers = (dy, x, weight, dsum, dx, partial)
    with on_device(x):
        if block > _BWD_BLOCK:
            _rms_norm_bwd_loop_kernel[(programs,)](
                *pointers,
                *(rows, steps, width, eps, size1, size2, *strides),
                NDIM=ndim,
                BLOCK=_LOOP_BLOCK,
                num_warps=_warps(_LOOP_BLOCK),
            )
        else:
            _rms_norm_bwd_kernel[(programs,)](
                *pointers,
                *(rows, steps, width, eps, size1, size2, *strides),
                NDIM=ndim,
                ROWS=tile_rows,
                BLOCK=block,
                STAGES=2 if tile * x.element_size() > 16384 else 3,
                num_warps=_warps(tile),
            )
        if partial is not None:
            _add_partial_rows_kernel[(triton.cdiv(width, 32),)](
                partial, dweight, programs, width, ROWS=64, BLOCK=32, num_warps=4
            )
    return dx, dweight
