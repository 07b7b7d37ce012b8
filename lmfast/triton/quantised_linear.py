"""Products with a matrix of 8 or 4 bit numbers for NVIDIA GPUs.

Floor: at few rows the bytes of the codes, once; at many the operations of the matrix units. Codes
are widened in registers: int8 numbers are exact in 16 bits, and their scale, one per row of the
matrix, is applied to the sum; 4 bit numbers are multiplied by the scale of their group and rounded
to x's dtype, as the widened matrix would be. Both halves of a byte belong to one column of x each,
so a tile of bytes makes two products, with the even and the odd columns of x.

One row of x takes no matrix instruction, which would be 15/16 empty: a program multiplies rows of
the matrix with x elementwise, keeps a sum per thread, and adds across threads once at the end.

The gradient of x, dy W, walks the rows of the matrix instead of its columns: the same bytes once.
There the scale of an int8 row stands inside the sum, so it is multiplied into the codes, which are
rounded as the widened matrix would be: products of dy and a scale would be too small for fp16. Both
columns of a byte again have a sum each, and are stored side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import INTERPRETED, on_device
from lmfast.triton._tuning import pick, size_class

# The first is the default; of the matrix kernel's, it is what fp32 takes.
VECTOR_CONFIGS = (
    {"BLOCK_N": 8, "BLOCK_K": 512, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4},
)
MATRIX_CONFIGS = (
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
)
GRADIENT_CONFIGS = (
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
)


@triton.jit
def _numbers(codes, scales_ptr, n, depth, there, scales0, HALF: tl.constexpr, GROUP: tl.constexpr):
    """The numbers of a tile of bytes in float32: of int8 without their scale."""
    if GROUP == 0:
        return codes.to(tl.float32)
    value = codes.to(tl.int32)
    value = (value >> 4) if HALF == 1 else (value & 15)
    # depth counts bytes, a group is of GROUP numbers.
    at = n.to(tl.int64)[:, None] * scales0 + (depth // (GROUP // 2))[None, :]
    return (value - 8).to(tl.float32) * tl.load(scales_ptr + at, mask=there, other=0.0).to(
        tl.float32
    )


@triton.jit
def _quantised_vector_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    width,
    columns,
    x0,
    codes0,
    scales0,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes_row = codes_ptr + n.to(tl.int64)[:, None] * codes0
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, columns, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        there = (n < width)[:, None] & (k < columns)[None, :]
        codes = tl.load(codes_row + k[None, :], mask=there, other=0)
        if GROUP == 0:
            x = tl.load(x_ptr + row * x0 + k, mask=k < columns, other=0.0).to(tl.float32)
            acc += codes.to(tl.float32) * x[None, :]
        else:
            even = tl.load(x_ptr + row * x0 + 2 * k, mask=k < columns, other=0.0).to(tl.float32)
            odd = tl.load(x_ptr + row * x0 + 2 * k + 1, mask=k < columns, other=0.0).to(tl.float32)
            acc += _numbers(codes, scales_ptr, n, k, there, scales0, 0, GROUP) * even[None, :]
            acc += _numbers(codes, scales_ptr, n, k, there, scales0, 1, GROUP) * odd[None, :]
    y = tl.sum(acc, axis=1)
    if GROUP == 0:
        y *= tl.load(scales_ptr + n, mask=n < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + n, y.to(y_ptr.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=["rows"])
def _quantised_matrix_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    rows,
    width,
    columns,
    x0,
    codes0,
    scales0,
    GROUP: tl.constexpr,
    DOT_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(width, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x0
    codes_row = codes_ptr + n.to(tl.int64)[:, None] * codes0
    dtype = tl.float32 if DOT_FP32 else x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, columns, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        there = (n < width)[:, None] & (k < columns)[None, :]
        x_there = (m < rows)[:, None] & (k < columns)[None, :]
        codes = tl.load(codes_row + k[None, :], mask=there, other=0)
        if GROUP == 0:
            x = tl.load(x_row + k[None, :], mask=x_there, other=0.0).to(dtype)
            acc = tl.dot(x, tl.trans(codes.to(dtype)), acc, input_precision="tf32x3")
        else:
            even = tl.load(x_row + 2 * k[None, :], mask=x_there, other=0.0).to(dtype)
            odd = tl.load(x_row + 2 * k[None, :] + 1, mask=x_there, other=0.0).to(dtype)
            w = _numbers(codes, scales_ptr, n, k, there, scales0, 0, GROUP).to(dtype)
            acc = tl.dot(even, tl.trans(w), acc, input_precision="tf32x3")
            w = _numbers(codes, scales_ptr, n, k, there, scales0, 1, GROUP).to(dtype)
            acc = tl.dot(odd, tl.trans(w), acc, input_precision="tf32x3")
    if GROUP == 0:
        acc *= tl.load(scales_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * width + n[None, :]
    y_there = (m < rows)[:, None] & (n < width)[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=y_there)


@triton.jit(do_not_specialize=["rows"])
def _quantised_grad_kernel(
    dy_ptr,
    codes_ptr,
    scales_ptr,
    dx_ptr,
    rows,
    width,
    columns,
    dy0,
    codes0,
    scales0,
    GROUP: tl.constexpr,
    DOT_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK_K)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = tl.float32 if DOT_FP32 else dy_ptr.dtype.element_ty
    dy_row = dy_ptr + m.to(tl.int64)[:, None] * dy0
    low = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, width, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        there = (n < width)[:, None] & (k < columns)[None, :]
        dy_there = (m < rows)[:, None] & (n < width)[None, :]
        dy = tl.load(dy_row + n[None, :], mask=dy_there, other=0.0).to(dtype)
        at = n.to(tl.int64)[:, None] * codes0 + k[None, :]
        codes = tl.load(codes_ptr + at, mask=there, other=0)
        if GROUP == 0:
            scale = tl.load(scales_ptr + n, mask=n < width, other=0.0).to(tl.float32)
            w = (codes.to(tl.float32) * scale[:, None]).to(dtype)
            low = tl.dot(dy, w, low, input_precision="tf32x3")
        else:
            w = _numbers(codes, scales_ptr, n, k, there, scales0, 0, GROUP).to(dtype)
            low = tl.dot(dy, w, low, input_precision="tf32x3")
            w = _numbers(codes, scales_ptr, n, k, there, scales0, 1, GROUP).to(dtype)
            high = tl.dot(dy, w, high, input_precision="tf32x3")
    dx_there = (m < rows)[:, None] & (k < columns)[None, :]
    if GROUP == 0:
        at = m.to(tl.int64)[:, None] * columns + k[None, :]
        tl.store(dx_ptr + at, low.to(dx_ptr.dtype.element_ty), mask=dx_there)
    else:
        at = 2 * (m.to(tl.int64)[:, None] * columns + k[None, :])
        tl.store(dx_ptr + at, low.to(dx_ptr.dtype.element_ty), mask=dx_there)
        tl.store(dx_ptr + at + 1, high.to(dx_ptr.dtype.element_ty), mask=dx_there)


def quantised_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Launches a kernel; the arguments of ``lmfast::quantised_linear``, codes with unit stride."""
    y = x.new_empty((*x.shape[:-1], codes.shape[0]))
    if y.numel() == 0:
        return y
    flat = x.reshape(-1, x.shape[-1])
    rows, width, columns = flat.shape[0], *codes.shape
    group = 0 if codes.dtype == torch.int8 else x.shape[-1] // max(1, scales.shape[1])
    operands = (flat, codes, scales, bias, y)
    strides = (flat.stride(0), codes.stride(0), scales.stride(0))
    vector = rows == 1

    def launch(config: dict[str, int]) -> None:
        across = triton.cdiv(width, config["BLOCK_N"])
        if vector:
            _quantised_vector_kernel[(across, rows)](
                *operands, width, columns, *strides, GROUP=group, **config
            )
        else:
            _quantised_matrix_kernel[(across * triton.cdiv(rows, config["BLOCK_M"]),)](
                *(*operands, rows, width, columns, *strides),
                GROUP=group,
                DOT_FP32=INTERPRETED and x.dtype == torch.bfloat16,
                **config,
            )

    name = "quantised_vector" if vector else "quantised_matrix"
    configs: tuple[dict[str, int], ...] = VECTOR_CONFIGS if vector else MATRIX_CONFIGS
    if not vector and x.dtype == torch.float32:
        configs = configs[:1]
    key = (x.dtype, size_class(rows), width, columns, group)
    with on_device(x):
        launch(pick(name, key, configs, x.device, launch))
    return y


def quantised_linear_backward(dy: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Launches the gradient's kernel: that of x; dy with unit stride in its last dimension."""
    width, columns = codes.shape
    depth = columns * (1 if codes.dtype == torch.int8 else 2)
    dx = dy.new_empty((*dy.shape[:-1], depth))
    if dx.numel() == 0:
        return dx
    flat = dy.reshape(-1, width)
    rows = flat.shape[0]
    group = 0 if codes.dtype == torch.int8 else depth // max(1, scales.shape[1])

    def launch(config: dict[str, int]) -> None:
        across = triton.cdiv(columns, config["BLOCK_K"])
        _quantised_grad_kernel[(across * triton.cdiv(rows, config["BLOCK_M"]),)](
            *(flat, codes, scales, dx, rows, width, columns),
            *(flat.stride(0), codes.stride(0), scales.stride(0)),
            GROUP=group,
            DOT_FP32=INTERPRETED and dy.dtype == torch.bfloat16,
            **config,
        )

    configs = GRADIENT_CONFIGS[:1] if dy.dtype == torch.float32 else GRADIENT_CONFIGS
    key = (dy.dtype, size_class(rows), width, columns, group)
    with on_device(dy):
        launch(pick("quantised_grad", key, configs, dy.device, launch))
    return dx
