"""A linear layer with bias, ReLU and a low-rank update (LoRA) in one pass, for NVIDIA GPUs.

Floor: at few rows the bytes of the matrix, once; at many the operations of the matrix units, where
cuBLAS is the better product. What this kernel is for are the few rows of decoding with an adapter
that is not merged: in eager PyTorch four launches and three passes over the output, here one of
each. Every program walks the whole depth and so meets all of x: it takes the product with the first
factor along in the same loop, as R more columns of its tile (R / BLOCK_N more operations, no more
bytes of the matrix), rounds it to x's dtype as the separate product would be, and multiplies the
second factor's columns at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import INTERPRETED, next_power_of_2, on_device
from lmfast.triton._tuning import pick, size_class

# fp32's products are three each, and with the update's beside them spill in larger tiles.
FP32_CONFIG = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
# The first is the default.
CONFIGS = (
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    rows,
    width,
    depth,
    x0,
    w0,
    w1,
    a0,
    a1,
    b0,
    b1,
    scale,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RELU: tl.constexpr,
    DOT_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(width, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    dtype = tl.float32 if DOT_FP32 else x_ptr.dtype.element_ty
    x_row = x_ptr + m.to(tl.int64)[:, None] * x0
    weight_row = weight_ptr + n.to(tl.int64)[None, :] * w0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for begin in range(0, depth, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x_there = (m < rows)[:, None] & (k < depth)[None, :]
        x = tl.load(x_row + k[None, :], mask=x_there, other=0.0).to(dtype)
        there = (k < depth)[:, None] & (n < width)[None, :]
        w = tl.load(weight_row + k.to(tl.int64)[:, None] * w1, mask=there, other=0.0).to(dtype)
        acc = tl.dot(x, w, acc, input_precision="tf32x3")
        if RANK > 0:
            there = (k < depth)[:, None] & (r < RANK)[None, :]
            at = k.to(tl.int64)[:, None] * a0 + r[None, :] * a1
            a = tl.load(a_ptr + at, mask=there, other=0.0).to(dtype)
            low = tl.dot(x, a, low, input_precision="tf32x3")
    if RANK > 0:
        there = (r < RANK)[:, None] & (n < width)[None, :]
        at = r.to(tl.int64)[:, None] * b0 + n.to(tl.int64)[None, :] * b1
        b = tl.load(b_ptr + at, mask=there, other=0.0).to(dtype)
        rounded = low.to(x_ptr.dtype.element_ty).to(dtype)
        acc += tl.full([], scale, tl.float32) * tl.dot(rounded, b, input_precision="tf32x3")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # NaN stays
    at = m.to(tl.int64)[:, None] * width + n[None, :]
    y_there = (m < rows)[:, None] & (n < width)[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=y_there)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Launches the kernel.

    Args:
        x: (rows, K) with unit stride in its last dimension.
        weight: (N, K), any strides; bias: (N,).
        relu: clip at zero.
        a, b, scale: the update scale (x a) b, (K, R) and (R, N), any strides.
    """
    rows, (width, depth) = x.shape[0], weight.shape
    y = x.new_empty((rows, width))
    if y.numel() == 0:
        return y
    rank = 0 if a is None else a.shape[1]
    a_strides = (0, 0) if a is None else a.stride()
    b_strides = (0, 0) if b is None else b.stride()

    def launch(config: dict[str, int]) -> None:
        across = triton.cdiv(width, config["BLOCK_N"])
        _linear_kernel[(across * triton.cdiv(rows, config["BLOCK_M"]),)](
            *(x, weight, bias, a, b, y, rows, width, depth),
            *(x.stride(0), *weight.stride(), *a_strides, *b_strides, float(scale)),
            RANK=rank,
            BLOCK_R=max(16, next_power_of_2(rank)),
            RELU=relu,
            DOT_FP32=INTERPRETED and x.dtype == torch.bfloat16,
            **config,
        )

    key = (x.dtype, size_class(rows), width, depth, size_class(rank), weight.stride(1) == 1)
    configs = (FP32_CONFIG,) if x.dtype == torch.float32 else CONFIGS
    with on_device(x):
        launch(pick("linear", key, configs, x.device, launch))
    return y
