"""Caches of eight-bit floats: exact rounding, the same attention as on what was stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmfast import KVCache, ops
from lmfast._dispatch import BackendError
from lmfast.ops._storage import FLOAT8, rounded


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_to_the_nearest_and_never_beyond() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    inside = torch.cat(
        (codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1]))
    )
    for x in (inside, -inside):
        assert torch.equal(rounded(x, FLOAT8).float(), x.to(FLOAT8).float())
    # Halves to even, written out.
    even = torch.where(torch.arange(126) % 2 == 0, codes[:-1], codes[1:])
    assert torch.equal(rounded(middles, FLOAT8).float(), even)
    beyond = torch.tensor([449.0, 464.0, 465.0, 1e30, -1e30])
    assert rounded(beyond, FLOAT8).float().tolist() == [448.0] * 4 + [-448.0]
    lost = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert (rounded(lost, FLOAT8).view(torch.uint8) == 0x7F).all()


def test_float64_is_rounded_once() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(FLOAT8).double()
    middles = (codes[1:] + codes[:-1]) / 2
    for sign in (1.0, -1.0):
        assert torch.equal(rounded(sign * codes, FLOAT8).double(), sign * codes)
        # float32 does not tell these from the middles.
        above, below = (sign * middles * (1.0 + e) for e in (1e-12, -1e-12))
        assert torch.equal(rounded(above, FLOAT8).double(), sign * codes[1:])
        assert torch.equal(rounded(below, FLOAT8).double(), sign * codes[:-1])
    assert torch.equal(rounded(middles, FLOAT8).float(), rounded(middles.float(), FLOAT8).float())
    beyond = torch.tensor([1e39, -1e300, torch.inf, torch.nan, 1e-300], dtype=torch.float64)
    found = rounded(beyond, FLOAT8).float()
    assert found[:2].tolist() == [448.0, -448.0]
    assert found[2:4].isnan().all()
    assert found[4] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_is_that_on_the_stored_numbers(dtype: torch.dtype) -> None:
    q = normal(2, 4, 2, 24).to(dtype)
    keys, values = (rounded(normal(3, 2, 150, 24, seed=s), FLOAT8) for s in (1, 2))
    lengths = torch.tensor([140, 66])
    options: dict[str, Any] = {
        "table": torch.tensor([[1, 0, 2], [1, 2, 9]], dtype=torch.int32),
        "window": 90,
        "sinks": normal(4, seed=3).to(dtype),
    }
    found = ops.cached_attention(q, keys, values, lengths, **options)
    wide = (t.to(dtype) for t in (keys, values))
    expected = ops.cached_attention(q, *wide, lengths, backend="torch", **options)
    assert torch.equal(found, expected)


def test_new_tokens_are_rounded_once_and_attended_to_as_stored() -> None:
    q, k, v = normal(2, 4, 1, 16), normal(2, 2, 1, 16, seed=1) * 300, normal(2, 2, 1, 16, seed=2)
    keys, values = (torch.zeros(2, 2, 70, 16).to(FLOAT8) for _ in range(2))
    lengths, (cos, sin) = torch.tensor([3, 70]), ops.rope_tables(70, 16)
    out = ops.decode_attention(q, k, v, keys, values, lengths, cos, sin)
    rotated_q, rotated_k = ops.rope(q, k, cos, sin, positions=lengths - 1)
    for row, column in enumerate((2, 69)):
        assert torch.equal(
            keys[row, :, column].float(), rounded(rotated_k[row, :, 0], FLOAT8).float()
        )
        assert torch.equal(values[row, :, column].float(), v[row, :, 0].to(FLOAT8).float())
    expected = ops.cached_attention(rotated_q, keys.float(), values.float(), lengths)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("window", [None, 20])
def test_a_cache_of_eight_bit_floats(window: int | None) -> None:
    """Rows that share, move and end, beside a cache that holds the rounded numbers in fp32."""
    options: dict[str, Any] = {"num_layers": 1, "batch": 2, "num_kv_heads": 2, "head_dim": 8}
    small = KVCache(**options, dtype=FLOAT8, window=window)
    wide = KVCache(**options, window=window)

    def step(length: int, batch: int, seed: int) -> None:
        k, v = normal(2, batch, 2, length, 8, seed=seed).unbind()
        q = normal(batch, 4, length, 8, seed=seed + 1)
        found = small.append(0, k, v)
        expected = wide.append(0, *(rounded(t, FLOAT8).float() for t in (k, v)))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
        got, want = (cache.attend(0, q) for cache in (small, wide))
        torch.testing.assert_close(got, want)

    step(70, 2, 1)
    assert small.memory().used * 4 == wide.memory().used
    step(1, 2, 3)
    for cache in (small, wide):
        cache.reorder([1, 0, 1])
    step(2, 3, 5)
    if window is None:
        for cache in (small, wide):
            cache.truncate(60)
        step(3, 3, 7)


def test_kernels_that_cannot_store_say_so() -> None:
    q, k = normal(1, 2, 1, 8), normal(1, 2, 1, 8)
    keys = torch.zeros(1, 2, 4, 8).to(FLOAT8)
    slot = torch.tensor([0])
    with pytest.raises(BackendError, match="float8_e4m3fn"):
        ops.rope_append(q, k, k, keys, keys.clone(), slot, backend="cpu")
    scales = torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match="key_scales"):
        ops.rope_append(q, k, k, keys, keys.clone(), slot, key_scales=scales, value_scales=scales)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        ops.cached_attention(q, keys.to(torch.float8_e5m2), keys.to(torch.float8_e5m2), slot)
