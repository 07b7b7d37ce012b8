"""Triton kernels in Triton's interpreter, on CPU tensors. Run by test_triton.py in a process of
its own, because the interpreter is chosen before triton is imported.

The interpreter cuts fp32 to bf16 where a GPU rounds to nearest, so bf16 results get a tolerance of
their own: see ``assert_cut_to_bf16``. A program takes about 1 ms, so shapes are tiny.
"""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (mends it)
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

Cases = list[tuple[str, Op, Sample]]


def some(found: Cases) -> Cases:
    """All but most of the many samples of attention and of draws, which all run in float32: in
    other dtypes only their loads and stores differ."""
    names = (*SUMS, "sample")
    many = [c for c in found if c[1].name in names]
    return [c for c in found if c[1].name not in names] + many[1::5]


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
            namespace.triton_quantised_linear_backward,
            (rows, torch.ones(8, 3).to(torch.uint8), classes[:8, :3]),
        ),
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
