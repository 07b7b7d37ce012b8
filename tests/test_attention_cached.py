"""Attention on a cache beyond what every op must do: tables, int8, lengths, splits, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import LargestTensor
from torch import Tensor

from lmfast import KVCache, _extension, ops
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
        ({"scale": True}, TypeError, "scale must be a float"),
        ({"softcap": True}, TypeError, "softcap must be float"),
        ({"softcap": 1e-50}, ValueError, "softcap must lie between"),
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


@pytest.mark.usefixtures("needs_cpu_kernels")
def test_nothing_behind_the_lengths_is_read(cpu_isa: str) -> None:
    for t in (1, 20):
        for stored in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
            q = torch.randn(2, 4, t, 40)
            keys, values = (torch.randn(3, 2, 200, 40) * 20 for _ in "kv")
            keys, values = keys.to(stored), values.to(stored)
            table = torch.tensor([[2, 0, 0, -1], [1, 7, 7, 7]], dtype=torch.int32)
            lengths = torch.tensor([150, 60])
            options: dict[str, Any] = {"table": table}
            if stored == torch.int8:
                options |= {n: torch.rand(3, 2, 200) / 50 for n in ("key_scales", "value_scales")}
            expected = ops.cached_attention(q, keys, values, lengths, **options, backend="cpu")
            unused = torch.ones(3, 200, dtype=torch.bool)
            for b, n in enumerate(lengths.tolist()):
                for j in range(n):
                    unused[table[b, j // 64], j] = False
            unused = unused[:, None].expand(3, 2, 200)
            if stored == torch.int8:
                options["key_scales"][unused] = math.nan
                options["value_scales"][unused] = math.inf
            else:
                keys[unused], values[unused] = math.nan, math.inf
            found = ops.cached_attention(q, keys, values, lengths, **options, backend="cpu")
            assert torch.equal(found, expected)


@pytest.mark.usefixtures("needs_cpu_kernels")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_threads_and_splits_change_nothing(stored: torch.dtype, cpu_isa: str) -> None:
    threads = torch.get_num_threads()
    wide = 40 if stored == torch.int8 else 1
    keys, values = ((torch.randn(2, 1, 2200, 32) * wide).to(stored) for _ in "kv")
    scales: dict[str, Tensor] = {}
    if stored == torch.int8:
        scales = {n: torch.rand(2, 1, 2200) / 40 for n in ("key_scales", "value_scales")}
    factors = [s[..., None] for s in scales.values()] or [1, 1]
    lengths = torch.tensor([2200, 1500])
    # Blocks of the two rows exchanged: every second one lies in the other's storage row.
    table = torch.arange(2, dtype=torch.int32)[:, None].repeat(1, 35)
    table[:, 1::2] = table[:, 1::2].flip(0)
    swapped = torch.arange(2200) // 64 % 2 == 1
    try:
        for heads, t in ((4, 1), (4, 16)):
            q = torch.randn(2, heads, t, 32)
            for by_table in (False, True):
                seen = [x.double() * f for x, f in zip((keys, values), factors)]
                if by_table:
                    seen = [torch.where(swapped[:, None], x.flip(0), x) for x in seen]
                options: dict[str, Any] = {**scales, "table": table if by_table else None}
                found = []
                for n in (1, 2, 3):
                    torch.set_num_threads(n)
                    found.append(
                        ops.cached_attention(q, keys, values, lengths, **options, backend="cpu")
                    )
                assert torch.equal(found[0], found[1])
                assert torch.equal(found[0], found[2])
                assert relative_error(found[0], row_by_row(q, *seen, lengths)) < 1e-6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("needs_cpu_kernels")
@pytest.mark.parametrize(
    "change",
    ["zero query", "tiny query", "huge query", "nan query", "inf query", "negative scales"]
    + ["nan scale", "inf scale", "tiny scales", "huge scale", "all numbers -128"],
)
def test_int8_with_numbers_of_every_kind(change: str, cpu_isa: str) -> None:
    """Kernels that multiply bytes must notice what integers of 16 or 24 bits cannot hold."""
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(2, 6, 2, 40)
        keys, values = (torch.randint(-127, 128, (2, 2, 150, 40), dtype=torch.int8) for _ in "kv")
        key_scales, value_scales = (torch.rand(2, 2, 150) / 50 for _ in "kv")
        match change.split():
            case ["zero", _]:
                q[0] = 0
            case ["tiny", "query"]:
                q[:, 2] *= 1e-36
                key_scales *= 1e30
            case ["huge", "query"]:
                q[:, 2] *= 1e30
                key_scales *= 1e-30
            case ["nan", "query"]:
                q[1, 3, 1, 7] = math.nan
            case ["inf", "query"]:
                q[1, 3, 1, 7] = math.inf
            case ["negative", _]:
                value_scales[:, :, ::3] *= -1
                key_scales[:, :, ::5] *= -1
            case ["nan", "scale"]:
                value_scales[0, 0, 20] = key_scales[1, 1, 99] = math.nan
            case ["inf", "scale"]:
                value_scales[0, 0, 20] = math.inf
            case ["tiny", "scales"]:
                value_scales *= 1e-33
            case ["huge", "scale"]:
                value_scales[:, :, 77] = 1e30
            case _:
                keys.fill_(-128)
                values.fill_(-128)
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        given = (q.to(dtype), keys, values, torch.tensor([150, 97]))
        found, expected = (
            ops.cached_attention(*given, **scales, backend=backend) for backend in ("cpu", "torch")
        )
        eps = torch.finfo(dtype).eps
        largest = expected.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(
            found,
            expected,
            rtol=2e-5 if eps < 1e-6 else eps,
            atol=16 * eps * largest,
            equal_nan=True,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([100])}, r"lengths must lie in 0\.\.70, got 100"),
        ({"lengths": torch.tensor([-1])}, r"lengths must lie in 0\.\.70, got -1"),
        ({"table": torch.tensor([[0, 3]], dtype=torch.int32)}, r"table must lie in 0\.\.0, got 3"),
        (
            {"table": torch.tensor([[-1, 0]], dtype=torch.int32)},
            r"table must lie in 0\.\.0, got -1",
        ),
    ],
)
def test_contents_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    keys, values = storage(1, 1, 70, 8)
    arguments: dict[str, Any] = {"lengths": torch.tensor([70])} | change
    for backend in (None, "torch"):
        with pytest.raises(ValueError, match=message):
            ops.cached_attention(
                torch.zeros(1, 1, 1, 8), keys, values, **arguments, backend=backend
            )


@pytest.mark.usefixtures("needs_cpu_kernels")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_options_crossed(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, group, b = (draw(st.integers(1, n)) for n in (2, 5, 3))
    t, capacity = draw(st.integers(0, 20)), draw(st.integers(1, 300))
    d = draw(st.one_of(st.integers(1, 70), st.integers(71, 256)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    stored = draw(st.sampled_from((dtype, torch.float32, torch.bfloat16, torch.int8)))
    lengths = torch.tensor([draw(st.integers(0, capacity)) for _ in range(b)])
    options: dict[str, Any] = {}
    rows, h = b, kv_heads * group
    if draw(st.booleans()):
        rows = draw(st.integers(1, 4))
        blocks = -(-capacity // 64)
        options["table"] = torch.randint(rows, (b, blocks), dtype=torch.int32)
    if stored == torch.int8:
        options |= {
            n: torch.rand(rows, kv_heads, capacity) / 60 for n in ("key_scales", "value_scales")
        }
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 100))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.5, 20))
    if draw(st.booleans()):
        options["sinks"] = torch.randn(h)
    if draw(st.booleans()):
        options["alibi"] = torch.rand(h)
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1.5, 1.5)) / math.sqrt(d)
    wide = 60 if stored == torch.int8 else 1
    q = torch.randn(b, h, t, d).to(dtype)
    keys, values = ((torch.randn(rows, kv_heads, capacity, d) * wide).to(stored) for _ in "kv")
    _extension.set_cpu_isa(draw(st.sampled_from(_extension.available_cpu_isas())))
    try:
        found = ops.cached_attention(q, keys, values, lengths, **options, backend="cpu")
    finally:
        _extension.set_cpu_isa(_extension.available_cpu_isas()[-1])
    plain = ops.cached_attention(q, keys, values, lengths, **options, backend="torch")
    # As for attention: a few units of what is multiplied.
    tolerance = {"atol": 4e-6, "rtol": 2e-5}
    if dtype != torch.float32:
        eps = torch.finfo(dtype).eps
        tolerance = {"atol": 8 * eps, "rtol": 4 * eps}
    torch.testing.assert_close(found, plain, **tolerance)


@pytest.mark.parametrize("by_table", [False, True])
def test_the_reference_copies_no_more_than_the_longest_row(by_table: bool) -> None:
    keys, values = storage(2, 2, 6400, 8)
    table = torch.zeros(2, 100, dtype=torch.int32) if by_table else None
    q, lengths = torch.randn(2, 2, 1, 8), torch.tensor([70, 30])
    with LargestTensor() as largest:
        ops.cached_attention(q, keys, values, lengths, table=table, backend="torch")
    assert largest.elements <= 2 * 2 * 70 * 8


def test_a_cache_on_a_device_gives_the_operator_what_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = KVCache(1, 2, 2, 8, max_length=6400, device="meta").fork()
    k = torch.zeros(2, 2, 70, 8, device="meta")
    cache.rope_append(0, k.clone(), k, k)
    seen: dict[str, Any] = {}

    def look(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **options: Any) -> Tensor:
        seen.update(keys=keys, values=values, table=options["table"])
        return q

    monkeypatch.setattr(ops, "cached_attention", look)
    cache.attend(0, k[:, :, -1:])
    assert seen["keys"].shape[2] == seen["values"].shape[2] == 70
    assert seen["table"].shape[1] == 2
