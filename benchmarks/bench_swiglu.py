"""swiglu and geglu against PyTorch, eager and compiled, forward and with gradients.

Floor: the bytes each must read and write once; `copy` is a plain copy of as many bytes. Gate and up
are the halves of one packed projection, as the layers have them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# (rows, width of one half): a training batch, the small reference model, one decoded token.
SHAPES = pytest.mark.parametrize(
    "shape", [(4096, 2048), (3712, 512), (1, 8192)], ids=lambda s: "x".join(map(str, s))
)
KINDS = pytest.mark.parametrize("kind", ["swiglu", "geglu", "geglu exact"])


def functions(kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Ours and the formula in PyTorch, both of the packed projection."""
    if kind == "swiglu":
        return ops.swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    approximate = "none" if kind == "geglu exact" else "tanh"

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate=approximate) * up

    return lambda x: ops.geglu(x, approximate=approximate), plain


@DTYPES
@KINDS
@SHAPES
def bench_glu(
    compare: Callable[..., None], shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    rows, width = shape
    x = torch.randn(rows, 2 * width).to(dtype)
    ours, plain = functions(kind)
    compiled = torch.compile(plain)
    compare(
        f"{kind} {rows}x{width} {dtype}",
        lambda: ours(x),
        {"eager": lambda: plain(x), "compile": lambda: compiled(x)},
        moved=3 * x.nbytes // 2,
    )


@DTYPES
@KINDS
@SHAPES
def bench_glu_with_gradients(
    compare: Callable[..., None], shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    rows, width = shape
    x = torch.randn(rows, 2 * width).to(dtype).requires_grad_()
    dy = torch.randn(rows, width).to(dtype)
    ours, plain = functions(kind)
    compiled = torch.compile(plain)
    compare(
        f"{kind} fwd+bwd {rows}x{width} {dtype}",
        lambda: torch.autograd.grad(ours(x), x, dy),
        {
            "eager": lambda: torch.autograd.grad(plain(x), x, dy),
            "compile": lambda: torch.autograd.grad(compiled(x), x, dy),
        },
        moved=8 * x.nbytes // 2,
    )
