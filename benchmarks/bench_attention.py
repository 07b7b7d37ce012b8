"""attention against SDPA, compiled flex_attention and the textbook formula; caches; memory.

Floor: arithmetic, 4 T S D operations per head forward, 10 backward, half of them when causal;
beside it the share of what `torch.mm` reaches. For decoding, the bytes of the cache, read from
memory: one run goes through several caches, which together are larger than a processor's.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

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
    (1, 2, 2, 8192, 64),
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


def has_room(shape: tuple[int, ...]) -> bool:
    """Whether the textbook's (T, S) matrices fit: with 8 heads of 8192 tokens each takes 2 GB."""
    return shape[1] * shape[3] ** 2 <= 2 * 8192**2


def pairs_of(shape: tuple[int, ...]) -> int:
    """Pairs of a query and a key; causality leaves half of them."""
    return shape[0] * shape[1] * shape[3] ** 2


@DTYPES
@EVERY_SHAPE
def bench_attention(
    compare: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v = inputs(shape, dtype)
    peers = {"sdpa": lambda: sdpa(q, k, v)}
    if has_room(shape):
        peers["textbook"] = lambda: textbook(q, k, v)
    if shape in (SHAPES[0], SHAPES[-1]):
        compiled = flex(q, k)
        peers["flex"] = lambda: compiled(q, k, v)
    compare(
        f"attention {shape} {dtype}",
        lambda: ops.attention(q, k, v, causal=True),
        peers,
        rounds=7,
        flops=2 * pairs_of(shape) * shape[4],
        dtype=dtype,
    )


@DTYPES
@EVERY_SHAPE
def bench_attention_with_gradients(
    compare: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # flex_attention has no backward on a CPU.
    q, k, v = (t.requires_grad_() for t in inputs(shape, dtype))
    dout = torch.randn(q.shape).to(dtype)
    peers = {"sdpa": lambda: torch.autograd.grad(sdpa(q, k, v), (q, k, v), dout)}
    if has_room(shape):
        peers["textbook"] = lambda: torch.autograd.grad(textbook(q, k, v), (q, k, v), dout)
    compare(
        f"attention fwd+bwd {shape} {dtype}",
        lambda: torch.autograd.grad(ops.attention(q, k, v), (q, k, v), dout),
        peers,
        rounds=5,
        flops=7 * pairs_of(shape) * shape[4],
        dtype=dtype,
    )


OUT_OF_CACHE = 128 * 2**20  # bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 16, 8192, 64),
        (1, 16, 16, 512, 64),
        (1, 32, 8, 8192, 128),
        (8, 12, 4, 1024, 64),
        (1, 8, 8, 128, 64),
    ],
    ids=lambda s: "x".join(map(str, s)),
)
def bench_decode_attention(
    compare: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    b, h, hkv, keys, d = shape
    int8 = dtype == torch.int8
    q = torch.randn(b, h, 1, d).to(torch.float32 if int8 else dtype)
    size = 2 * b * hkv * keys * d * dtype.itemsize

    def stored() -> Tensor:
        if int8:  # bytes of 1 to 63 are small normal numbers, also read as floats
            return torch.randint(1, 64, (b, hkv, keys, d), dtype=dtype)
        return torch.randn(b, hkv, keys, d).to(dtype)

    caches = [(stored(), stored()) for _ in range(max(2, OUT_OF_CACHE // size))]
    scales = torch.full((b, hkv, keys), 0.01) if int8 else None
    lengths = torch.full((b,), keys)

    def over_all(f: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for k, v in caches:
                f(k, v)

        return run

    def read(k: Tensor, v: Tensor) -> None:
        for t in (k, v):
            t.view(torch.float32).sum()

    def ours(k: Tensor, v: Tensor) -> Tensor:
        return ops.cached_attention(q, k, v, lengths, key_scales=scales, value_scales=scales)

    peers = {"read": over_all(read)}
    if not int8:
        new = torch.randn(b, hkv, 1, d).to(dtype)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=h != hkv)

        peers["sdpa"] = over_all(attend)
        peers["cat + sdpa"] = over_all(
            lambda k, v: attend(torch.cat((k, new), 2), torch.cat((v, new), 2))
        )
    with torch.inference_mode():
        compare(
            f"decode attention {shape} {dtype}, {len(caches)} caches",
            over_all(ours),
            peers,
            moved=len(caches) * size,
            rounds=7,
        )


@DTYPES
@pytest.mark.parametrize("new", [16, 256], ids=lambda n: f"{n} new")
def bench_prefill_on_a_cache(compare: Callable[..., None], new: int, dtype: torch.dtype) -> None:
    h, hkv, keys, d = 32, 8, 4096, 64
    q = torch.randn(1, h, new, d).to(dtype)
    k, v = (torch.randn(1, hkv, keys, d).to(dtype) for _ in "kv")
    mask = torch.ones(new, keys, dtype=torch.bool).tril(keys - new)
    lengths = torch.tensor([keys])
    compare(
        f"{new} tokens on a cache of {keys} {dtype}",
        lambda: ops.cached_attention(q, k, v, lengths),
        {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)},
    )


@DTYPES
def bench_triangular_mask(compare: Callable[..., None], dtype: torch.dtype) -> None:
    q, k, v = inputs(SHAPES[0], dtype)
    mask = torch.ones(1024, 1024, dtype=torch.bool).tril()
    compare(
        f"triangular mask {dtype}",
        lambda: ops.attention(q, k, v, causal=False, mask=mask),
        {
            "causal": lambda: ops.attention(q, k, v),
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        },
        rounds=9,
    )


MEMORY = """
import sys, torch, lmfast

def peak():  # in MB; ru_maxrss would begin with that of the process that started this one
    status = open("/proc/self/status").read().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024

attention = {
    "lmfast": lmfast.ops.attention,
    "sdpa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True
    ),
}[sys.argv[1]]
q, k, v = (torch.randn(1, 1, int(sys.argv[2]), 64, requires_grad=True) for _ in range(3))
attention(*(x[:, :, :64] for x in (q, k, v))).sum().backward()  # what loading takes
before = peak()
attention(q, k, v).sum().backward()
print(peak() - before)
"""


def bench_memory_at_16k(benchmark: Any, keep: Callable[..., None]) -> None:
    """Forward and backward of one head of 16 k tokens: no (T, S) matrix, which would be 1 GB."""
    length = 16384

    def grown(by: str) -> float:
        command = [sys.executable, "-c", MEMORY, by, str(length)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    ours = benchmark.pedantic(lambda: grown("lmfast"), rounds=1)
    keep(
        {
            "name": f"attention fwd+bwd of one head of {length}, memory",
            "lmfast_MB": ours,
            "sdpa_MB": grown("sdpa"),
            "one (T, S) matrix_MB": length * length * 4 / 2**20,
        }
    )
    assert ours < length * length * 4 / 2**20 / 8
