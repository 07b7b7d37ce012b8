"""Triton kernels in Triton's interpreter where they change their way: rows longer than a block,
more rows than programs, parts of the keys, storage of eight bits, what lies outside. See
triton_interpreted.py.
"""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (mends it)
from op_checks import check_gradients, check_values

import lmfast
from lmfast.ops.quantised_linear import dequantised
from lmfast.testing import Sample, assert_within_error_rule
from lmfast.triton import linear_cross_entropy


@pytest.mark.parametrize("width", [8192, 8193, 16385])
def test_rows_longer_than_a_block(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, r = torch.randn(2, 3, width, generator=generator).unbind()
    op = lmfast._dispatch.ops()["add_rms_norm"]
    sample = Sample("long", (x, r, torch.randn(width, generator=generator)))
    check_values(op, sample, "triton")
    check_gradients(op, sample, "triton")


def test_more_rows_than_programs() -> None:
    """Every program of the backward walks several blocks of rows, the last one cut short."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(701, 40, generator=generator)
    sample = Sample("tall", (x, torch.randn(40, generator=generator)))
    check_gradients(lmfast._dispatch.ops()["rms_norm"], sample, "triton")


def test_leading_dimensions_that_do_not_merge() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(4, 6, 5, 12, generator=generator)[::2, 1::2].transpose(0, 1)
    assert x.dim() == 4
    sample = Sample("strided", (x, torch.randn(12, generator=generator)))
    op = lmfast._dispatch.ops()["rms_norm"]
    check_values(op, sample, "triton")
    check_gradients(op, sample, "triton")


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_rows_past_the_tables_are_nan(interleaved: bool, inplace: bool) -> None:
    """On a GPU positions are not looked at by the host; the public check is passed by here."""
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(3, 2, 2, 10, generator=generator)
    k = torch.randn(3, 1, 2, 10, generator=generator)
    cos, sin = lmfast.ops.rope_tables(4, 6)
    starts = torch.tensor([2, 3, -1])  # both inside; second past the end; first before the start
    forward = lmfast._dispatch.implementation("rope", "triton").forward
    q_in, k_in = q.clone(), k.clone()
    results = forward(q_in, k_in, cos, sin, starts, 0, interleaved, inplace)
    assert (results[0] is q_in) == inplace
    lost = torch.tensor([[False, False], [False, True], [True, False]])
    inside = torch.tensor([[2, 3], [3, 0], [0, 0]])
    expected = lmfast.ops.rope(
        q, k, cos, sin, positions=inside, interleaved=interleaved, backend="torch"
    )
    for value, e in zip(results, expected, strict=True):
        lost_rows = lost[:, None, :, None].expand_as(value)
        assert torch.equal(value.isnan(), lost_rows)
        torch.testing.assert_close(value[~lost_rows], e[~lost_rows])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_in_place(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    q = torch.randn(2, 3, 4, 12, generator=generator).half()
    k = torch.randn(2, 4, 1, 12, generator=generator).half().transpose(1, 2)
    cos, sin = lmfast.ops.rope_tables(9, 8)
    options = {"interleaved": interleaved, "positions": 5}
    expected = lmfast.ops.rope(q, k, cos, sin, backend="torch", **options)
    exact = lmfast.ops.rope(q.double(), k.double(), cos, sin, backend="torch", **options)
    got = lmfast.ops.rope(q, k, cos, sin, inplace=True, backend="triton", **options)
    assert got[0] is q
    assert got[1] is k
    for value, plain, e in zip(got, expected, exact, strict=True):
        assert_within_error_rule(value, plain, e)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_in_several_chunks(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over chunks, the last one shorter; bf16 products of fp32 parameters in the first."""
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_PER_CHUNK", 64 * 4)
    generator = torch.Generator().manual_seed(10)
    hidden = torch.randn(10, 6, generator=generator)
    weight = torch.randn(19, 6, generator=generator)
    targets = torch.randint(19, (10,), generator=generator)
    targets[3] = -100
    options = {"bias": torch.randn(19, generator=generator), "reduction": reduction}
    op = lmfast._dispatch.ops()["linear_cross_entropy"]
    for dtype in (torch.float32, torch.float16):
        cast = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        sample = Sample("chunks", (hidden.to(dtype), weight.to(dtype), targets), cast)
        check_values(op, sample, "triton")
        check_gradients(op, sample, "triton")


def test_cross_entropy_of_rows_longer_than_a_block() -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(3, 16400, generator=generator)
    logits[:, 3:9] = -torch.inf  # masked out
    targets = torch.tensor([16399, 9000, 0])
    options = {"label_smoothing": 0.0, "z_loss": 0.001, "reduction": "none"}
    op = lmfast._dispatch.ops()["cross_entropy"]
    check_values(op, Sample("long", (logits, targets), options), "triton")
    check_gradients(op, Sample("long", (logits, targets), options), "triton")


def test_cross_entropy_in_place_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(12)
    leaf = torch.randn(5, 35, generator=generator)
    targets = torch.tensor([3, -100, 34, 0, 7])
    results = []
    for inplace in (False, True):
        x = leaf.clone().requires_grad_()
        logits = x * 1.0
        loss = lmfast.ops.cross_entropy(logits, targets, inplace=inplace, backend="triton")
        results.append((loss.detach(), torch.autograd.grad(loss * 3.0, x)[0]))
    torch.testing.assert_close(results[0], results[1])
    loss = lmfast.ops.cross_entropy(x * 1.0, targets, inplace=True, backend="triton")
    with pytest.raises(RuntimeError, match="no gradient of a gradient"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_targets_outside_the_classes_are_nan() -> None:
    """On a GPU targets are not looked at by the host; the public check is passed by here."""
    logits, targets = torch.randn(4, 9), torch.tensor([2, 9, -1, -100])
    backward = lmfast._dispatch.implementation("cross_entropy", "triton").backward
    settings = (targets, -100, "none", 0.0, 0.0, False)
    loss, grad = backward(torch.ones(4), logits, *settings, want_dlogits=True)
    lost = torch.tensor([False, True, True, False])
    assert torch.equal(loss.isnan(), lost)
    assert torch.equal(grad.isnan(), lost[:, None].expand(4, 9))
    assert not grad[3].any()


def test_gradients_of_quantised_and_low_rank_layers_in_several_tiles() -> None:
    """More rows, columns and depth than a tile holds, none of them its multiple."""
    generator = torch.Generator().manual_seed(15)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(33, 2 * 150)[:, ::2]
    for bits in (8, 4):
        codes, scales = lmfast.ops.quantise_weight(normal(70, 150) / 12, bits, group=30)
        sample = Sample("", (x, codes, scales, normal(70)))
        check_gradients(lmfast._dispatch.ops()["quantised_linear"], sample, "triton")
    factors = normal(150, 18) / 12, normal(18, 70) / 4
    sample = Sample("", (x, normal(70, 150) / 12, *factors), {"bias": normal(70), "scale": 0.7})
    check_gradients(lmfast._dispatch.ops()["lora_linear"], sample, "triton")


@pytest.mark.parametrize("bits", [8, 4])
def test_small_gradients_of_quantised_layers_in_fp16(bits: int) -> None:
    """Gradients of 1e-4 times scales of 1e-3 are below what fp16 holds; the sums are not."""
    generator = torch.Generator().manual_seed(16)
    weight = torch.randn(70, 150, generator=generator) / 12
    codes, scales = lmfast.ops.quantise_weight(weight, bits, group=30)
    dy = (1e-4 * torch.randn(3, 70, generator=generator)).half()
    x = torch.zeros(3, 150, dtype=torch.float16, requires_grad=True)
    lmfast.ops.quantised_linear(x, codes, scales, backend="triton").backward(dy)
    exact = dy.double() @ dequantised(codes, scales, torch.float64)
    # The matrix is rounded to 2^-12 of an element, and the result to 2^-25 where it is below
    # 2^-14: of elements of about 7e-5 both are less than 1e-3.
    assert (x.grad - exact).norm() < 1e-3 * exact.norm()


def test_attention_joins_parts_of_the_keys() -> None:
    """Decoding: several parts per row, some without a key, one row with none at all."""
    generator = torch.Generator().manual_seed(9)
    q = torch.randn(3, 4, 2, 8, generator=generator)
    k, v = torch.randn(2, 3, 2, 1100, 8, generator=generator).unbind()
    lengths = torch.tensor([1100, 5, 0])
    options = {"lengths": lengths, "sinks": torch.randn(4, generator=generator)}
    op = lmfast._dispatch.ops()["attention"]
    check_values(op, Sample("parts", (q, k, v), options), "triton")
    check_gradients(op, Sample("parts", (q, k, v), options), "triton")
    window = {**options, "window": 300}
    check_values(op, Sample("parts and window", (q, k, v), window), "triton")


def test_cached_attention_joins_parts_of_a_paged_int8_cache() -> None:
    """Several parts per row through a table; one row that ends in its first block, one empty."""
    generator = torch.Generator().manual_seed(13)
    q = torch.randn(3, 4, 1, 8, generator=generator)
    keys, values = torch.randint(-127, 128, (2, 4, 2, 600, 8), generator=generator).to(torch.int8)
    key_scales, value_scales = torch.rand(2, 4, 2, 600, generator=generator) / 50
    table = torch.randint(4, (3, 10), generator=generator).int()
    table[1, 1:] = 99  # behind the row's keys: not looked at
    lengths = torch.tensor([599, 40, 0])
    sample = Sample(
        "paged",
        (q, keys, values, lengths),
        {"table": table, "key_scales": key_scales, "value_scales": value_scales, "window": 500},
    )
    check_values(lmfast._dispatch.ops()["cached_attention"], sample, "triton")


@pytest.mark.parametrize("rotary", [0, 6, 16])
def test_rope_append_stores_eight_bit_floats(rotary: int) -> None:
    """To the bit: all numbers there are, their middles and neighbours, and what is beyond."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    beside = middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])
    beyond = torch.tensor([449.0, 1e30, torch.inf, torch.nan])
    values = torch.cat((codes, middles, *beside, beyond, -middles, -codes, -beyond))
    v = values[-(len(values) // 32 * 32) :].view(1, 2, -1, 16)
    k, steps = torch.randn(v.shape), v.shape[2]
    tables = lmfast.ops.rope_tables(steps, rotary) if rotary else (None, None)
    stored = []
    for backend in ("torch", "triton"):
        keys, held = (torch.zeros(1, 2, steps, 16).to(torch.float8_e4m3fn) for _ in range(2))
        forward = lmfast._dispatch.implementation("rope_append", backend).forward
        slots = torch.arange(steps).flip(0).contiguous()
        scales = (None, None)
        forward(k.clone(), k, v, keys, held, *scales, slots, None, *tables, None, 0, False)
        stored.append((keys, held.view(torch.uint8)))
    assert (stored[0][1] == 0x7F).any()  # NaN has no sign
    assert torch.equal(stored[0][1], stored[1][1])
    # Rotated in fp32 by either, the last digit may differ: at a middle it decides.
    a, b = (keys.float() for keys, _ in stored)
    assert ((a - b).abs() <= a.abs() / 8 + 2.0**-9).all()
    assert (a == b).float().mean() > 0.99


def test_cached_attention_on_eight_bit_floats() -> None:
    """Few and many queries, through a table: as on the same numbers in the queries' dtype."""
    generator = torch.Generator().manual_seed(16)
    keys, values = torch.randn(2, 3, 2, 150, 16, generator=generator).unbind()
    small = [t.to(torch.float8_e4m3fn) for t in (keys, values)]
    table = torch.tensor([[1, 0, 2], [2, 1, 9]], dtype=torch.int32)
    lengths, options = torch.tensor([149, 70]), {"table": table, "backend": "triton"}
    for dtype in (torch.float32, torch.float16):
        for tokens in (1, 5):
            q = torch.randn(2, 4, tokens, 16, generator=generator).to(dtype)
            found = lmfast.ops.cached_attention(q, *small, lengths, **options)
            wide = (t.to(dtype) for t in small)
            assert torch.equal(found, lmfast.ops.cached_attention(q, *wide, lengths, **options))


def test_cached_attention_of_a_storage_row_that_is_not_there_is_nan() -> None:
    """On a GPU neither table nor lengths are looked at by the host."""
    q, keys = torch.randn(3, 2, 1, 8), torch.randn(2, 1, 100, 8)
    forward = lmfast._dispatch.implementation("cached_attention", "triton").forward
    table = torch.tensor([[0, 1], [0, 2], [-1, 0]], dtype=torch.int32)
    options = (table, None, None, 0, 0.0, None, None, 0.3)
    out = forward(q, keys, keys, torch.tensor([10**6, 90, 3]), *options)
    assert torch.equal(out.isnan().all(-1).all(1)[:, 0], torch.tensor([False, True, True]))
    capped = forward(q, keys, keys, torch.tensor([100, 90, 3]), *options)
    assert torch.equal(out[0], capped[0])


@pytest.mark.parametrize("keys", [40, 600])
def test_a_query_of_nan_gives_nan(keys: int) -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, keys, 8)
    q[0, 1] = torch.nan
    out = lmfast.ops.attention(q, k, k, backend="triton")
    assert torch.equal(out.isnan().all(-1)[0, :, 0], torch.tensor([False, True]))


@pytest.mark.parametrize("rotary", [0, 6, 10])
def test_rope_append_stores_int8(rotary: int) -> None:
    """Scales to the bit, numbers to one; a zero vector, a NaN, a slot that is not there."""
    generator = torch.Generator().manual_seed(14)
    q, k, v = (torch.randn(2, h, 3, 10, generator=generator) for h in (3, 2, 2))
    k[0, 0, 1], v[1, 1, 2, 3] = 0.0, torch.nan
    tables = lmfast.ops.rope_tables(9, rotary) if rotary else (None, None)
    results = []
    for backend, slots in (("torch", [4, 0, 9, 6]), ("triton", [4, 0, 9, 6, -1, 12])):
        keys, values = torch.full((2, 2, 2, 6, 10), 77, dtype=torch.int8)
        key_scales, value_scales = torch.full((2, 2, 2, 6), 7.0)
        tokens = torch.tensor([1, 0, 5, 3, 2, 4][: len(slots)])
        forward = lmfast._dispatch.implementation("rope_append", backend).forward
        rotated = q.clone()
        forward(
            *(rotated, k, v, keys, values, key_scales, value_scales, torch.tensor(slots), tokens),
            *(*tables, None, 4, False),
        )
        results.append((rotated, key_scales, value_scales, keys, values))
    for i, (plain, value) in enumerate(zip(*results, strict=True)):
        if i < 3:
            torch.testing.assert_close(value, plain, rtol=2e-6, atol=1e-6, equal_nan=True)
        else:
            assert (value.int() - plain.int()).abs().max() <= 1
    assert results[1][2].isnan().sum() == 1


def test_only_the_first_axis_of_a_grid_grows_with_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's other axes end at 65,535: sequences times heads of one call can be more."""
    from triton.runtime.interpreter import InterpretedFunction

    from lmfast.triton import additive_attention, attention_backward, linear_recurrence
    from lmfast.triton.attention import attention
    from lmfast.triton.linear import linear
    from lmfast.triton.quantised_linear import quantised_linear, quantised_linear_backward

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *a, grid, **k: grids.append(grid))

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    options = (True, None, None, None, None, 0, 0.0, None, None, 0.125)
    q, lse = meta(70000, 2, 64, 16), meta(70000, 2, 64, dtype=torch.float32)
    attention(q, q, q, *options)
    attention_backward.attention_backward(q, q, q, q, q, lse, *options)
    rows, weight = meta(2**21, 64), meta(96, 64)
    linear(rows, weight, None, False)
    codes, scales = meta(96, 64, dtype=torch.int8), meta(96, dtype=torch.float32)
    quantised_linear(rows, codes, scales, None)
    quantised_linear_backward(meta(2**21, 96), codes, scales)
    x = q.view(70000, 128, 16)
    linear_recurrence.linear_recurrence(x, x, None)
    linear_recurrence.linear_recurrence_backward(x, x, x, None)
    one, v = meta(70000, 1, 16, dtype=torch.float32), meta(16, dtype=torch.float32)
    additive_attention.additive_attention(one, one, one, v, None)
    weights = meta(70000, 1, 1, dtype=torch.float32)
    additive_attention.additive_attention_backward(one, None, one, one, one, v, None, weights)
    assert len(grids) == 11
    assert max(grid[0] for grid in grids) > 65535
    assert all(n <= 65535 for grid in grids for n in grid[1:])
