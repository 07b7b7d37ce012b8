"""attention against SDPA, compiled flex_attention and the textbook formula; decoding on a cache.

Floor: arithmetic, 4 T S D operations per head forward, 10 backward, half of them when causal; for
decoding, the bytes of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lmfast import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# (B, H, Hkv, T, D): the shape of the target, grouped heads, head sizes, lengths.
SHAPES = [
    (4, 16, 16, 1024, 64),
    (1, 32, 8, 1024, 64),
    (4, 16, 16, 1024, 16),
    (2, 16, 16, 1024, 128),
    (32, 16, 16, 128, 64),
    (1, 8, 8, 8192, 64),
]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    b, h, hkv, t, d = shape
    return tuple(torch.randn(b, n, t, d).to(dtype) for n in (h, hkv, hkv))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group, t = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v


def flex(q: Tensor, k: Tensor) -> Callable[..., Tensor]:
    t, grouped = q.shape[2], q.shape[1] != k.shape[1]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)


@DTYPES
@EVERY_SHAPE
def bench_attention(
    compare: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v = inputs(shape, dtype)
    peers = {"sdpa": lambda: sdpa(q, k, v)}
    if shape[3] <= 1024:  # the (T, S) matrix of the longest shape is 2 GB
        peers["textbook"] = lambda: textbook(q, k, v)
    if shape == SHAPES[0]:
        compiled = flex(q, k)
        peers["flex"] = lambda: compiled(q, k, v)
    compare(
        f"attention {shape} {dtype}", lambda: ops.attention(q, k, v, causal=True), peers, rounds=9
    )


@DTYPES
@EVERY_SHAPE
def bench_attention_with_gradients(
    compare: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(shape, dtype))
    dout = torch.randn(q.shape).to(dtype)
    compare(
        f"attention fwd+bwd {shape} {dtype}",
        lambda: torch.autograd.grad(ops.attention(q, k, v), (q, k, v), dout),
        {"sdpa": lambda: torch.autograd.grad(sdpa(q, k, v), (q, k, v), dout)},
        rounds=7,
    )


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 16, 8192, 64), (1, 32, 8, 8192, 128), (8, 12, 4, 1024, 64), (1, 8, 8, 128, 64)],
    ids=lambda s: "x".join(map(str, s)),
)
def bench_decode_attention(
    compare: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    b, h, hkv, keys, d = shape
    q = torch.randn(b, h, 1, d).to(dtype)
    cache_k, cache_v = (torch.randn(b, hkv, keys + 256, d).to(dtype) for _ in "kv")
    k, v = cache_k[:, :, :keys], cache_v[:, :, :keys]
    lengths = torch.full((b,), keys)
    new = torch.randn(b, hkv, 1, d).to(dtype)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=h != hkv)

    compare(
        f"decode attention {shape} {dtype}",
        lambda: ops.attention(q, cache_k, cache_v, lengths=lengths),
        {
            "sdpa": lambda: attend(k, v),
            "cat + sdpa": lambda: attend(torch.cat((k, new), 2), torch.cat((v, new), 2)),
        },
        moved=k.nbytes + v.nbytes,
    )
