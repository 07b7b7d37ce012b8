"""Appending a token to a cache of four layers and attending, against what PyTorch offers.

cat: `torch.cat` of all keys and values, then SDPA: how a cache without preallocation works.
index_copy: preallocated storage, `index_copy_`, then SDPA on a view of what is there.
All three rotate q and k first; copy is of as many bytes as the keys and values that are read.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast import ops
from lmfast.generation import KVCache

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
BATCHES = pytest.mark.parametrize("batch", [1, 8])
HEADS, KV_HEADS, DIM, LAYERS = 16, 4, 64, 4


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def new_token(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    total = HEADS + 2 * KV_HEADS
    packed = torch.randn(batch, 1, total * DIM).to(dtype)
    heads = packed.view(batch, 1, total, DIM).transpose(1, 2)
    q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
    return q, k, v


@DTYPES
@BATCHES
@pytest.mark.parametrize("length", [512, 2048, 8192])
@pytest.mark.parametrize("stored", ["same", "int8"])
def bench_cache(
    compare: Callable[..., None], stored: str, length: int, batch: int, dtype: torch.dtype
) -> None:
    capacity = length + 64
    store_as = torch.int8 if stored == "int8" else dtype
    cache = KVCache(LAYERS, batch, KV_HEADS, DIM, max_length=capacity, dtype=store_as)
    past = torch.randn(LAYERS, 2, batch, KV_HEADS, length, DIM).to(dtype)
    cos, sin = ops.rope_tables(capacity, DIM)
    angles = [torch.cat((t, t), -1).to(dtype)[length : length + 1] for t in (cos, sin)]
    room = torch.zeros(LAYERS, 2, batch, KV_HEADS, capacity, DIM, dtype=dtype)
    room[..., :length, :] = past
    column = torch.tensor([length])
    q, k, v = new_token(batch, dtype)

    def rotated(x: Tensor) -> Tensor:
        return x * angles[0] + torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), -1) * angles[1]

    def cat() -> None:
        for old_keys, old_values in past:
            keys = torch.cat((old_keys, rotated(k)), 2)
            attend(rotated(q), keys, torch.cat((old_values, v), 2))

    def index_copy() -> None:
        for keys, values in room:
            keys.index_copy_(2, column, rotated(k))
            values.index_copy_(2, column, v)
            attend(rotated(q), keys[:, :, : length + 1], values[:, :, : length + 1])

    def ours() -> None:
        cache.truncate(length)
        for layer in range(LAYERS):
            cache.rope_append(layer, q, k, v, cos, sin, interleaved=False)
            cache.attend(layer, q)

    with torch.inference_mode():
        for layer in range(LAYERS):
            cache.append(layer, *past[layer])
        compare(
            f"cache S={length} B={batch} {dtype} as {stored}",
            ours,
            {"cat": cat, "index_copy": index_copy},
            moved=LAYERS * 2 * batch * KV_HEADS * length * DIM * store_as.itemsize,
            rounds=15,
        )


@pytest.mark.parametrize("length", [512, 8192])
def bench_beam_step(compare: Callable[..., None], length: int) -> None:
    """Four beams, all children of one, take one token in 12 layers: copying and attention."""
    beams, layers = 4, 12
    cache = KVCache(layers, beams, KV_HEADS, DIM, max_length=length + 64)
    past = torch.randn(2, beams, KV_HEADS, length, DIM)
    copies = [past.clone() for _ in range(layers)]
    q, k, v = new_token(beams, torch.float32)
    parents = torch.tensor([0, 0, 0, 0])

    def index_select() -> None:
        for layer in range(layers):
            chosen = copies[layer].index_select(1, parents)
            keys, values = (torch.cat((chosen[i], t), 2) for i, t in enumerate((k, v)))
            attend(q, keys, values)

    def ours() -> None:
        cache.truncate(length)
        cache.reorder(parents)
        for layer in range(layers):
            cache.rope_append(layer, q, k, v)
            cache.attend(layer, q)

    with torch.inference_mode():
        for layer in range(layers):
            cache.append(layer, past[0], past[1])
        compare(f"beam step S={length}", ours, {"index_select": index_select}, rounds=11)


@pytest.mark.parametrize("batch", [1, 8])
def bench_overhead(compare: Callable[..., None], batch: int) -> None:
    """Twelve layers on a cache of one token: what is left is the cost of the calls."""
    layers = 12
    cache = KVCache(layers, batch, KV_HEADS, DIM, max_length=64)
    q, k, v = new_token(batch, torch.float32)
    cos, sin = ops.rope_tables(64, DIM)
    room = torch.zeros(layers, 2, batch, KV_HEADS, 64, DIM)
    slots = torch.arange(batch) * 64
    lengths = torch.ones(batch, dtype=torch.int64)

    def operators() -> None:
        for layer in range(layers):
            ops.rope_append(q, k, v, *room[layer], slots, cos, sin, positions=0)
            ops.cached_attention(q, *room[layer], lengths)

    def ours() -> None:
        cache.reset()
        for layer in range(layers):
            cache.rope_append(layer, q, k, v, cos, sin)
            cache.attend(layer, q)

    with torch.inference_mode():
        compare(f"overhead of 12 layers B={batch}", ours, {"operators": operators}, rounds=201)
