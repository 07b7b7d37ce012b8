"""Triton kernels in Triton's interpreter, on CPU tensors. Run by test_triton.py in a process of
its own, because the interpreter is chosen before triton is imported.

The interpreter cuts fp32 to bf16 where a GPU rounds to nearest, so bf16 results get a tolerance of
their own: see ``assert_cut_to_bf16``. A program takes about 1 ms, so shapes are tiny.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter
from op_checks import (
    SUMS,
    call,
    call_on_copies,
    cases,
    check_gradients,
    check_values,
    gradients,
    ops_with,
)

import lmfast
from lmfast._dispatch import BackendError, Op
from lmfast.testing import Sample, assert_within_error_rule, unit_in_last_place
from lmfast.triton import linear_cross_entropy

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_loop_bounds(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes loop bounds ints by ``int(array([n]))``, which numpy 2.4 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_loop_bounds

Cases = list[tuple[str, Op, Sample]]


def some(found: Cases) -> Cases:
    """All but most of attention's many samples, which all run in float32."""
    many = [c for c in found if c[1].name in SUMS]
    return [c for c in found if c[1].name not in SUMS] + many[1::5]


def stores_bf16(case: tuple[str, Op, Sample]) -> bool:
    return case[1].mutates != () and any(t.dtype == torch.bfloat16 for t in case[2].tensors())


def has_backward(op: Op) -> bool:
    return op.implementations["triton"].backward is not None


EXACT = list(cases("triton", "cpu", (torch.float32,)))
EXACT += some(list(cases("triton", "cpu", (torch.float16,))))
BF16 = some(list(cases("triton", "cpu", (torch.bfloat16,)))) + list(filter(stores_bf16, EXACT))
EXACT = [case for case in EXACT if not stores_bf16(case)]


def parametrize(found: Cases) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("op", "sample"), [c[1:] for c in found], ids=[c[0] for c in found]
    )


def assert_cut_to_bf16(value: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """The error of one rounding toward zero: less than a unit in the last place, and half a unit
    more where the exact arithmetic starts from a sum rounded the other way."""
    finite = exact.isfinite()
    assert torch.equal(value.isfinite(), finite), what
    error = (value.double() - exact)[finite].abs()
    scale = exact.abs()[finite].amax() if finite.any() else 1.0
    allowed = 1.5 * unit_in_last_place(exact[finite], torch.bfloat16) + scale * 2.0**-8
    assert (error <= allowed).all(), f"{what}: {(error - allowed).max()} over"


@parametrize(EXACT)
def test_values(op: Op, sample: Sample) -> None:
    check_values(op, sample, "triton")


# Left out: "large scores", where numpy's products round by the shape of the tile, and a score near
# 1000 is off by 1e-4 between forward and backward; "rising scores", where one weight is 1 and the
# gradient of q is the difference of two equal sums, added up in different orders.
@parametrize([c for c in EXACT if has_backward(c[1]) and not c[2].name.endswith("scores")])
def test_gradients(op: Op, sample: Sample) -> None:
    check_gradients(op, sample, "triton")


@parametrize(BF16)
def test_bf16_values(op: Op, sample: Sample) -> None:
    plain, exact = call(op, sample, "torch"), call(op, sample.to_fp64(), "torch")
    for value, p, e in zip(call(op, sample, "triton"), plain, exact, strict=True):
        assert value.dtype == p.dtype
        if p.dtype == torch.bfloat16:
            assert_cut_to_bf16(value, e, sample.name)
        else:  # what the kernel does not round, it does not cut
            assert_within_error_rule(value, p, e, sample.name)


# The others' gradients are sums of values cut to bf16, all in one direction.
@parametrize(
    [
        c
        for c in BF16
        if has_backward(c[1]) and c[1].name not in ("attention", "linear_cross_entropy")
    ]
)
def test_bf16_gradients(op: Op, sample: Sample) -> None:
    exact = gradients(op, sample.to_fp64(), "torch")
    for value, e in zip(gradients(op, sample, "triton"), exact, strict=True):
        assert_cut_to_bf16(value, e, sample.name)


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


@pytest.mark.parametrize("op", ops_with("triton"), ids=lambda op: op.name)
def test_compiles_into_one_graph(op: Op) -> None:
    torch._dynamo.reset()  # else the ops count as recompilations of one function
    sample = next(iter(op.sample_inputs("cpu", torch.float32)))

    def function(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call_on_copies(op, sample, "triton", *args)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*sample.args), function(*sample.args), strict=True):
        assert torch.equal(got, expected)


def test_operators_pass_opcheck() -> None:
    x, weight = torch.randn(3, 2, 5).transpose(0, 1), torch.randn(5)
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 3, 1, 8).transpose(1, 2)
    cos, sin = lmfast.ops.rope_tables(8, 6)
    namespace = torch.ops.lmfast
    keys = torch.randn(2, 1, 5, 8)
    options = (True, None, torch.tensor([2, 1]), None, None, 0, 0.0, None, None, 0.5)
    out, lse = namespace.triton_attention(q, keys, keys, *options)
    rows, classes, ids = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([1, 8, -100, 0])
    loss_settings = (-100, 1, 0.1, 0.01)
    for operator, args in (
        (namespace.triton_rms_norm, (x, weight, 1e-6)),
        (namespace.triton_add_rms_norm, (x, x.clone(), None, 1e-6)),
        (namespace.triton_rms_norm_backward, (x, x, weight, 1e-6, x, True)),
        (namespace.triton_swiglu, (x, x.clone())),
        (namespace.triton_swiglu_backward, (q[..., :4], q, None)),
        (namespace.triton_geglu, (q, None, False)),
        (namespace.triton_geglu_backward, (x, x, x.clone(), True)),
        (namespace.triton_rope, (q, k, cos, sin, torch.tensor([1, 4]), 0, True, False)),
        (namespace.triton_rope_, (q, k, cos, sin, None, 2, False)),
        (namespace.triton_additive_attention, (q[0], keys[:, 0], keys[:, 0], classes[0], None)),
        (namespace.triton_linear_recurrence, (keys[0], keys[0], keys[0, :, 0])),
        (namespace.triton_linear_recurrence_backward, (keys[0], keys[0], keys[0], None)),
        (namespace.triton_linear, (rows, classes, classes[:, 0], True, None, None, 0.5)),
        (namespace.triton_quantised_linear, (rows, classes.to(torch.int8), classes[:, 0], None)),
        (
            namespace.triton_sample,
            (rows, torch.rand(4).double(), torch.ones(1, 8).double(), *(None,) * 4, True),
        ),
        (namespace.triton_cross_entropy, (rows, ids % 8, None, *loss_settings, True)),
        (namespace.triton_cross_entropy_, (rows.clone(), ids % 8, None, *loss_settings)),
        (
            namespace.triton_linear_cross_entropy,
            (rows, classes, ids, None, None, None, *loss_settings, 0.0, False, True, True, False),
        ),
        (
            namespace.triton_cached_attention,
            (q, keys, keys, torch.tensor([5, 3]), None, None, None, 4, None, None, None, None),
        ),
        (
            namespace.triton_rope_append,
            (q.clone(), keys[:, :, :3], keys[:, :, :3], keys, keys.clone(), None, None)
            + (torch.tensor([0, 1, 2, 7, 8, 9]), None, cos, sin, None, 2, True),
        ),
        (namespace.triton_attention, (q, keys, keys, *options)),
        (namespace.triton_attention_backward, (q, q, keys, keys, out, lse, *options)),
    ):
        torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.ones(2, 4, dtype=torch.float64), None, "float64"),
        (torch.ones(2, 4), torch.ones(4).half(), "weight is torch.float16"),
        (torch.ones(1, 65537), None, "65537 elements"),
        (torch.ones(1, 1, 1, 1, 4), None, "4 leading dimensions"),
    ],
)
def test_says_why_not(x: torch.Tensor, weight: torch.Tensor | None, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        lmfast.ops.rms_norm(x, weight, backend="triton")
