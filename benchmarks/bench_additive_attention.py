"""additive_attention against its formula in PyTorch, eager and compiled.

Floor: B T S A evaluations of tanh. Rows: a decoder step (T = 1) and all steps of a batch at once,
at inference and with gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmfast import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# (B, T, S, A = D): a decoder step of a translation model, of a small one, a batch of all steps.
SHAPES = pytest.mark.parametrize(
    "shape",
    [(64, 1, 50, 256), (1, 1, 20, 128), (32, 30, 40, 256)],
    ids=lambda s: "x".join(map(str, s)),
)


def formula(
    query: Tensor, keys: Tensor, values: Tensor, w_query: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    scores = torch.tanh((query @ w_query.t())[:, :, None] + keys[:, None]) @ v
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return weights @ values, weights


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    batch, steps, length, width = shape
    sizes = [(batch, steps, width), *[(batch, length, width)] * 2, (width, width), (width,)]
    tensors = [(torch.randn(s) / s[-1] ** (len(s) < 3) ** 0.5).to(dtype) for s in sizes]
    lengths = torch.randint(length // 2, length + 1, (batch, 1))
    return tensors, torch.arange(length) < lengths


@DTYPES
@SHAPES
def bench_additive_attention(
    compare: Callable[..., None], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    tensors, mask = arguments(shape, dtype)
    compiled = torch.compile(formula)
    compare(
        f"additive_attention {shape} {dtype}",
        lambda: ops.additive_attention(*tensors, mask=mask),
        {
            "eager": lambda: formula(*tensors, mask),
            "compile": lambda: compiled(*tensors, mask),
        },
    )


@DTYPES
@SHAPES
def bench_additive_attention_with_gradients(
    compare: Callable[..., None], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    tensors, mask = arguments(shape, dtype)
    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(formula)
    upstream = torch.randn(shape[0], shape[1], shape[3]).to(dtype)

    def run(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function()[0], leaves, upstream)

    compare(
        f"additive_attention fwd+bwd {shape} {dtype}",
        lambda: run(lambda: ops.additive_attention(*leaves, mask=mask)),
        {
            "eager": lambda: run(lambda: formula(*leaves, mask)),
            "compile": lambda: run(lambda: compiled(*leaves, mask)),
        },
    )
