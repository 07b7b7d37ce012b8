"""RMSNorm and add + RMSNorm forward for NVIDIA GPUs.

Floor: bytes. x (and residual) is read and y (and the sum) written once: a row stays in registers
between its sum of squares and its output, up to `_FWD_BLOCK` columns; longer rows are walked twice,
the second time from the L2 cache. Rows are found through strides of up to three merged leading
dimensions: a (B, T, H, D) tensor seen as (B, H, T, D) is read where it lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import next_power_of_2, on_device

# Largest row held in registers: 16 elements in each of 1024 threads.
_FWD_BLOCK = 16384
LOOP_BLOCK = 4096
# Short rows share a program: it then has this many elements and keeps 16 bytes per thread and load.
TILE = 2048


@triton.jit
def row_offset(row, size1, size2, stride0, stride1, stride2, NDIM: tl.constexpr):
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
    at = row_offset(row, size1, size2, x0, x1, x2, NDIM)[:, None] + col[None, :]
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        at = row_offset(row, size1, size2, r0, r1, r2, NDIM)[:, None] + col[None, :]
        h += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = h.to(sum_ptr.dtype.element_ty)
        at = row_offset(row, size1, size2, s0, s1, s2, NDIM)[:, None] + col[None, :]
        tl.store(sum_ptr + at, total, mask=mask)
        h = total.to(tl.float32)
    mean = tl.sum(h * h, axis=1) / width
    h *= tl.rsqrt(mean + tl.full([], eps, tl.float32))[:, None]
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    at = row_offset(row, size1, size2, y0, y1, y2, NDIM)[:, None] + col[None, :]
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
    x_ptr += row_offset(row, size1, size2, x0, x1, x2, NDIM)
    y_ptr += row_offset(row, size1, size2, y0, y1, y2, NDIM)
    if residual_ptr is not None:
        residual_ptr += row_offset(row, size1, size2, r0, r1, r2, NDIM)
        sum_ptr += row_offset(row, size1, size2, s0, s1, s2, NDIM)
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


def row_layout(*operands: Tensor) -> tuple[int, int, int, list[int]]:
    """(dimensions left, size1, size2, three strides per operand) after merging leading dimensions.

    Neighbouring dimensions merge where every operand steps through both evenly; contiguous
    tensors have one left, the most is three.
    """
    shape = operands[0].shape[:-1]
    sizes: list[int] = []
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


def count_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def warps_for(tile: int) -> int:
    return min(32, max(4, tile // 512))


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rows, width = count_rows(x), x.shape[-1]
    if rows == 0:
        return y, total
    # Without a residual its strides are never used; x's keep the argument list one length.
    r, s = (x, x) if residual is None or total is None else (residual, total)
    ndim, size1, size2, strides = row_layout(x, r, y, s)
    pointers = (x, residual, weight, y, total)
    block = next_power_of_2(width)
    with on_device(x):
        if block > _FWD_BLOCK:
            _rms_norm_fwd_loop_kernel[(rows,)](
                *pointers,
                *(width, eps, size1, size2, *strides),
                NDIM=ndim,
                BLOCK=LOOP_BLOCK,
                num_warps=warps_for(LOOP_BLOCK),
            )
        else:
            tile_rows = max(1, TILE // block)
            _rms_norm_fwd_kernel[(triton.cdiv(rows, tile_rows),)](
                *pointers,
                *(rows, width, eps, size1, size2, *strides),
                NDIM=ndim,
                ROWS=tile_rows,
                BLOCK=block,
                num_warps=warps_for(tile_rows * block),
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
