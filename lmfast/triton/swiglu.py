"""SwiGLU and GeGLU for NVIDIA GPUs, forward and backward.

Floor: bytes. Forward reads gate and up and writes y; backward reads dy, gate and up and writes both
gradients, and computes the activation again. A program takes a tile of rows and columns, found
through strides of up to three merged leading dimensions, so the halves of one packed projection are
read and written where they lie.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import next_power_of_2, on_device
from lmfast.triton.rms_norm import row_layout, row_offset

# Elements of a program: 16 bytes per load and two loads in flight for each of 128 threads.
_TILE = 2048

_SILU = tl.constexpr(0)
_GELU_TANH = tl.constexpr(1)


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """The activation and its slope."""
    if KIND == _SILU:
        s = 1.0 / (1.0 + tl.exp(-x))
        slope = s * (1.0 + x * (1.0 / (1.0 + tl.exp(x))))
        return x * s, slope
    square = x * x
    if KIND == _GELU_TANH:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u
        u = x * (1.5957691216057308 + 0.07135481282628138 * square)
        s = 1.0 / (1.0 + tl.exp(-u))
        rest = 1.0 / (1.0 + tl.exp(u))
        return x * s, s * (1.0 + x * rest * (1.5957691216057308 + 0.21406443847884414 * square))
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * square)


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def _glu_fwd_kernel(
    y_ptr,
    gate_ptr,
    up_ptr,
    rows,
    width,
    size1,
    size2,
    y0,
    y1,
    y2,
    g0,
    g1,
    g2,
    u0,
    u1,
    u2,
    NDIM: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (col < width)
    at = row_offset(row, size1, size2, g0, g1, g2, NDIM)[:, None] + col
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = row_offset(row, size1, size2, u0, u1, u2, NDIM)[:, None] + col
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activate(gate, KIND)
    at = row_offset(row, size1, size2, y0, y1, y2, NDIM)[:, None] + col
    tl.store(y_ptr + at, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def _glu_bwd_kernel(
    dgate_ptr,
    dup_ptr,
    gate_ptr,
    up_ptr,
    dy_ptr,
    rows,
    width,
    size1,
    size2,
    d0,
    d1,
    d2,
    g0,
    g1,
    g2,
    u0,
    u1,
    u2,
    y0,
    y1,
    y2,
    NDIM: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (col < width)
    at = row_offset(row, size1, size2, g0, g1, g2, NDIM)[:, None] + col
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = row_offset(row, size1, size2, u0, u1, u2, NDIM)[:, None] + col
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = row_offset(row, size1, size2, y0, y1, y2, NDIM)[:, None] + col
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activate(gate, KIND)
    at = row_offset(row, size1, size2, d0, d1, d2, NDIM)[:, None] + col
    tl.store(dgate_ptr + at, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


def _kind(tanh: bool) -> int:
    return 1 if tanh else 2


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program."""
    block = min(_TILE, next_power_of_2(width))
    return _TILE // block, block


def _forward(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    gate, up = _halves(gate, up)
    y = gate.new_empty(gate.shape)
    if y.numel() == 0:
        return y
    ndim, size1, size2, strides = row_layout(y, gate, up)
    width = y.shape[-1]
    rows = y.numel() // width
    tile_rows, block = _tile(width)
    with on_device(gate):
        _glu_fwd_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(width, block))](
            *(y, gate, up, rows, width, size1, size2, *strides),
            NDIM=ndim,
            KIND=kind,
            ROWS=tile_rows,
            BLOCK=block,
            num_warps=4,
        )
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    dgate = gate.new_empty(gate.shape)
    dup = gate.new_empty(0 if up is None else up.shape)
    if dy.numel() == 0:
        return dgate, dup
    dgate_half, dup_half = (dgate, dup) if up is not None else _halves(dgate, None)
    gate, up = _halves(gate, up)
    ndim, size1, size2, strides = row_layout(dgate_half, gate, up, dy)
    width = dy.shape[-1]
    rows = dy.numel() // width
    tile_rows, block = _tile(width)
    with on_device(gate):
        _glu_bwd_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(width, block))](
            *(dgate_half, dup_half, gate, up, dy, rows, width, size1, size2, *strides),
            NDIM=ndim,
            KIND=kind,
            ROWS=tile_rows,
            BLOCK=block,
            num_warps=4,
        )
    return dgate, dup


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """Launches the forward kernel; the arguments of ``lmfast::swiglu``."""
    return _forward(gate, up, 0)


def geglu(gate: Tensor, up: Tensor | None, tanh: bool) -> Tensor:
    """Launches the forward kernel; the arguments of ``lmfast::geglu``."""
    return _forward(gate, up, _kind(tanh))


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel; the arguments of ``lmfast::swiglu_backward``."""
    return _backward(dy, gate, up, 0)


def geglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel; the arguments of ``lmfast::geglu_backward``."""
    return _backward(dy, gate, up, _kind(tanh))
