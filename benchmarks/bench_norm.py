"""rms_norm and add_rms_norm against PyTorch, eager and compiled, forward and with gradients.

Floor: the bytes each must read and write once; `copy` is a plain copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lmfast import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# (rows, width): a training batch, the small reference model, one token of a decoding step.
SHAPES = pytest.mark.parametrize(
    "shape", [(4096, 2048), (3712, 128), (1, 2048)], ids=lambda s: "x".join(map(str, s))
)


@DTYPES
@SHAPES
def bench_rms_norm(
    compare: Callable[..., None], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, w = torch.randn(shape).to(dtype), torch.ones(shape[1]).to(dtype)

    def eager() -> torch.Tensor:
        return F.rms_norm(x, (shape[1],), w, 1e-6)

    compare(
        f"rms_norm {shape[0]}x{shape[1]} {dtype}",
        lambda: ops.rms_norm(x, w),
        {"eager": eager, "compile": torch.compile(eager)},
        moved=2 * x.nbytes,
    )


@DTYPES
@SHAPES
def bench_rms_norm_with_gradients(
    compare: Callable[..., None], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    w = torch.ones(shape[1]).to(dtype).requires_grad_()
    dy = torch.randn(shape).to(dtype)
    compiled = torch.compile(lambda x, w: F.rms_norm(x, (shape[1],), w, 1e-6))
    compare(
        f"rms_norm fwd+bwd {shape[0]}x{shape[1]} {dtype}",
        lambda: torch.autograd.grad(ops.rms_norm(x, w), (x, w), dy),
        {
            "eager": lambda: torch.autograd.grad(F.rms_norm(x, (shape[1],), w, 1e-6), (x, w), dy),
            "compile": lambda: torch.autograd.grad(compiled(x, w), (x, w), dy),
        },
        moved=5 * x.nbytes,
    )


@DTYPES
def bench_add_rms_norm_with_gradients(compare: Callable[..., None], dtype: torch.dtype) -> None:
    x = torch.randn(4096, 2048).to(dtype).requires_grad_()
    r = torch.randn(4096, 2048).to(dtype).requires_grad_()
    w = torch.ones(2048).to(dtype).requires_grad_()
    dy, ds = torch.randn(4096, 2048).to(dtype), torch.randn(4096, 2048).to(dtype)

    def plain(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = x + r
        return F.rms_norm(s, (2048,), w, 1e-6), s

    compiled = torch.compile(plain)
    compare(
        f"add_rms_norm fwd+bwd 4096x2048 {dtype}",
        lambda: torch.autograd.grad(ops.add_rms_norm(x, r, w), (x, r, w), (dy, ds)),
        {
            "eager": lambda: torch.autograd.grad(plain(x, r, w), (x, r, w), (dy, ds)),
            "compile": lambda: torch.autograd.grad(compiled(x, r, w), (x, r, w), (dy, ds)),
        },
        moved=8 * x.nbytes,
    )
