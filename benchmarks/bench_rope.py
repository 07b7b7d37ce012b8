"""rope on q and k against the formula as Hugging Face models write it, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmfast import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
B, H, T, D = 4, 16, 1024, 64


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)


def plain_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def plain_interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    return one(q), one(k)


@DTYPES
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def bench_rope(
    compare: Callable[..., None], interleaved: bool, layout: str, dtype: torch.dtype
) -> None:
    q, k = (
        torch.randn(B, H, T, D).to(dtype)
        if layout == "BHTD"
        else torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
        for _ in range(2)
    )
    cos, sin = ops.rope_tables(T, D)
    if interleaved:
        plain, tables = plain_interleaved, (cos.to(dtype), sin.to(dtype))
    else:
        plain = plain_half
        tables = (torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype))
    compiled = torch.compile(plain)
    compare(
        f"rope {'interleaved' if interleaved else 'half'} {layout} {dtype}",
        lambda: ops.rope(q, k, cos, sin, interleaved=interleaved),
        {"eager": lambda: plain(q, k, *tables), "compile": lambda: compiled(q, k, *tables)},
        moved=2 * (q.nbytes + k.nbytes),
    )


@DTYPES
def bench_rope_with_gradients(compare: Callable[..., None], dtype: torch.dtype) -> None:
    q, k = (torch.randn(B, H, T, D).to(dtype).requires_grad_() for _ in range(2))
    dq, dk = torch.randn(B, H, T, D).to(dtype), torch.randn(B, H, T, D).to(dtype)
    cos, sin = ops.rope_tables(T, D)
    tables = (torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype))
    compiled = torch.compile(plain_half)
    compare(
        f"rope half fwd+bwd {dtype}",
        lambda: torch.autograd.grad(ops.rope(q, k, cos, sin, interleaved=False), (q, k), (dq, dk)),
        {
            "eager": lambda: torch.autograd.grad(plain_half(q, k, *tables), (q, k), (dq, dk)),
            "compile": lambda: torch.autograd.grad(compiled(q, k, *tables), (q, k), (dq, dk)),
        },
        moved=4 * (q.nbytes + k.nbytes),
    )
