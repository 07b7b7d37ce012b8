"""Attention on a cache beyond what every op must do: tables, int8, lengths, splits, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lmfast import ops
from lmfast.testing import relative_error


def storage(
    b: int, hkv: int, capacity: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return torch.randn(b, hkv, capacity, d).to(dtype), torch.randn(b, hkv, capacity, d).to(dtype)


def row_by_row(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    """The contract through ``attention``, one row at a time, in float64."""
    rows = []
    for b, n in enumerate(lengths.tolist()):
        k, v = (t[b : b + 1, :, :n].double() for t in (keys, values))
        rows.append(ops.attention(q[b : b + 1].double(), k, v, **options, backend="torch"))
    return torch.cat(rows)


def test_reference_is_attention_on_each_rows_keys() -> None:
    q = torch.randn(3, 4, 3, 16, dtype=torch.float64)
    keys, values = storage(3, 2, 150, 16, torch.float64)
    lengths = torch.tensor([150, 3, 77])
    expected = row_by_row(q, keys, values, lengths, window=60, softcap=2.0)
    for b, n in enumerate(lengths.tolist()):
        keys[b, :, n:], values[b, :, n:] = math.nan, math.inf
    found = ops.cached_attention(q, keys, values, lengths, window=60, softcap=2.0, backend="torch")
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)


def test_reference_finds_keys_through_the_table() -> None:
    q = torch.randn(2, 2, 2, 8, dtype=torch.float64)
    keys, values = storage(3, 2, 200, 8, torch.float64)
    table = torch.tensor([[2, 0, 1, 1], [2, 1, -5, 99]], dtype=torch.int32)
    lengths = torch.tensor([195, 100])
    gathered = [
        torch.stack(
            [
                torch.cat([t[[2, 0, 1, 1][i], :, 64 * i : 64 * i + 64] for i in range(4)], 1),
                torch.cat([t[2, :, :64], t[1, :, 64:200]], 1),
            ]
        )
        for t in (keys, values)
    ]
    expected = row_by_row(q, *gathered, lengths)
    found = ops.cached_attention(q, keys, values, lengths, table=table, backend="torch")
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)


def test_int8_is_its_scales_times_its_numbers() -> None:
    q = torch.randn(2, 2, 1, 8)
    stored = [torch.randint(-127, 128, (2, 1, 70, 8), dtype=torch.int8) for _ in "kv"]
    scales = [torch.rand(2, 1, 70) / 50 for _ in "kv"]
    lengths = torch.tensor([70, 66])
    keys, values = (t * s[..., None] for t, s in zip(stored, scales))
    found = ops.cached_attention(
        q, *stored, lengths, key_scales=scales[0], value_scales=scales[1], backend="torch"
    )
    assert relative_error(found, row_by_row(q, keys, values, lengths)) < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3)}, ValueError, "q must have shape"),
        ({"keys": torch.zeros(1, 2, 4, 9)}, ValueError, "keys must have shape"),
        ({"keys": torch.zeros(1, 2, 4, 8).int()}, TypeError, "keys must be float32"),
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor"),
        ({"values": torch.zeros(1, 2, 4, 8).half()}, ValueError, "one shape and dtype"),
        ({"q": torch.zeros(1, 3, 1, 8)}, ValueError, "multiple"),
        ({"q": torch.zeros(2, 2, 1, 8), "lengths": torch.tensor([1, 1])}, ValueError, "2 rows"),
        ({"lengths": torch.zeros(1)}, TypeError, "lengths must be a tensor of integers"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "lengths must have shape"),
        ({"table": torch.zeros(1, 1)}, TypeError, "table must be an int32"),
        ({"table": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, "table must have shape"),
        ({"key_scales": torch.ones(1, 2, 4)}, ValueError, "key_scales is for int8"),
        ({"int8": True}, ValueError, "key_scales is required"),
        ({"int8": True, "key_scales": torch.ones(1, 2, 5)}, ValueError, "key_scales must have"),
        ({"int8": True, "key_scales": torch.ones(1, 2, 4).half()}, TypeError, "must be float32"),
        ({"window": 0}, ValueError, "window must be positive"),
        ({"scale": "1"}, TypeError, "scale must be a float"),
        ({"q": torch.zeros(1, 2, 1, 8, requires_grad=True)}, ValueError, "no gradient"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {
        "q": torch.zeros(1, 2, 1, 8),
        "keys": torch.zeros(1, 2, 4, 8),
        "values": torch.zeros(1, 2, 4, 8),
        "lengths": torch.tensor([3]),
    } | change
    if arguments.pop("int8", False):
        arguments |= {n: torch.zeros(1, 2, 4, 8, dtype=torch.int8) for n in ("keys", "values")}
    with pytest.raises(error, match=message):
        ops.cached_attention(**arguments)
