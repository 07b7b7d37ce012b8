"""Attention beyond what every op must do: golden numbers, masks, decoding, determinism, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmfast import _extension, ops
from lmfast.ops._attention_reference import reference
from lmfast.testing import assert_within_error_rule, relative_error

pytestmark = pytest.mark.usefixtures("needs_cpu_kernels")
HALVES = (torch.float32, torch.bfloat16, torch.float16)


def qkv(
    b: int, h: int, hkv: int, t: int, s: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(b, n, m, d).to(dtype) for n, m in ((h, t), (hkv, s), (hkv, s)))


def leaves(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_golden_numbers(backend: str) -> None:
    dtype = torch.float64 if backend == "torch" else torch.float32
    atol = 1e-9 if backend == "torch" else 2e-7
    q = torch.zeros(1, 1, 1, 6, dtype=dtype)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 4, 6, dtype=dtype)
    k[0, 0, :, 0] = torch.tensor([4.9, 17.15, 9.8, 12.25])
    one_hot = torch.eye(4, 6, dtype=dtype)[None, None]
    weights = ops.attention(q, k, one_hot, q_offset=1, backend=backend)[0, 0, 0]
    expected = [0.0066859301, 0.9933140699, 0, 0, 0, 0]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=dtype), atol=1e-6, rtol=0)

    q, k, v = (fill(n, (4, 6), 1).to(dtype)[None, None] for n in (60, 61, 62))
    weights = ops.attention(q, k, one_hot, backend=backend)[0, 0, :, :4]
    rows = [
        [1, 0, 0, 0],
        [0.089564506, 0.910435494, 0, 0],
        [0.526907396, 0.086932146, 0.386160458, 0],
        [0.37009055, 0.213061892, 0.056235785, 0.360611774],
    ]
    torch.testing.assert_close(weights, torch.tensor(rows, dtype=dtype), atol=atol, rtol=0)
    out = ops.attention(q, k, v, backend=backend)[0, 0]
    first = [-0.739180697, -0.131471354, 0.53807102, 0.954550186, 0.922089485, 0.45595569]
    last = [-0.525708258, -0.20289355, 0.215345166, 0.532303685, 0.598911464, 0.383841823]
    expected = torch.tensor([first, last], dtype=dtype)
    torch.testing.assert_close(out[[0, 3]], expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("d", [16, 33, 64, 128, 256])
def test_as_exact_as_torch_over_many_blocks(d: int, dtype: torch.dtype, cpu_isa: str) -> None:
    # Several blocks of queries, chunks of keys and, in the backward, ranges of keys.
    inputs = qkv(1, 2, 1, 330, 700, d, dtype)
    dout = torch.randn(1, 2, 330, d).to(dtype)
    found, peer, exact = leaves(inputs), leaves(inputs), leaves(tuple(t.double() for t in inputs))
    mask = torch.ones(330, 700, dtype=torch.bool).tril(370)
    y = ops.attention(*found, backend="cpu")
    p = F.scaled_dot_product_attention(*peer, attn_mask=mask, enable_gqa=True)
    e = ops.attention(*exact, backend="torch")
    assert_within_error_rule(y, p, e, "out")
    for out, grad in ((y, dout), (p, dout), (e, dout.double())):
        out.backward(grad)
    for name, f, p, e in zip(("dq", "dk", "dv"), found, peer, exact):
        assert f.grad is not None
        # Over many blocks chance evens out: as exact as PyTorch, without the exception that
        # samples of a few numbers need.
        allowed = 1.5 * relative_error(p.grad, e.grad) + torch.finfo(torch.float32).eps
        assert relative_error(f.grad, e.grad) <= allowed, name


def test_decoding_over_many_splits(cpu_isa: str) -> None:
    for dtype in HALVES:
        for heads, kv_heads, t, keys, d in (
            (4, 1, 1, 3000, 64),
            (4, 4, 2, 1111, 40),
            (1, 1, 8, 700, 256),
        ):
            q, k, v = qkv(1, heads, kv_heads, t, keys, d, dtype)
            cache_k, cache_v = (torch.full((1, kv_heads, keys + 50, d), math.nan) for _ in "kv")
            cache_k[:, :, :keys], cache_v[:, :, :keys] = k, v
            lengths = torch.tensor([keys])
            found = ops.attention(q, cache_k.to(dtype), cache_v.to(dtype), lengths=lengths)
            mask = torch.ones(t, keys, dtype=torch.bool).tril(keys - t)
            peer = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            exact = ops.attention(q.double(), k.double(), v.double(), backend="torch")
            # PyTorch's product runs in another order here; a unit of fp32 is all that is left.
            allowed = 1.5 * relative_error(peer, exact) + 2 * torch.finfo(torch.float32).eps
            assert relative_error(found, exact) <= allowed


def test_rows_that_see_nothing_are_zero_with_zero_gradients(cpu_isa: str) -> None:
    for dtype in HALVES:
        for t, options in (
            (40, {"q_offset": -20}),
            (40, {"lengths": torch.tensor([0, 40])}),
            (40, {"mask": torch.zeros(40, 40, dtype=torch.bool)}),
            (40, {"mask": torch.full((40, 40), torch.finfo(dtype).min, dtype=dtype)}),
            (2, {"q_offset": -20}),
        ):
            q, k, v = leaves(qkv(2, 2, 2, t, 40, 24, dtype))
            out = ops.attention(q, k, v, **options, backend="cpu")
            out.backward(torch.ones_like(out))
            blind = out.detach().float().abs().sum(-1) == 0
            assert blind.any()
            plain = ops.attention(q, k, v, **options, backend="torch").float().abs().sum(-1) == 0
            assert torch.equal(blind, plain)
            assert q.grad is not None
            assert (q.grad[blind] == 0).all()
            for leaf in (q, k, v):
                assert leaf.grad is not None
                assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("t", [1, 70])
def test_nothing_behind_the_lengths_is_read(t: int, cpu_isa: str) -> None:
    for dtype in HALVES:
        q, k, v = qkv(2, 2, 2, t, 100, 32, dtype)
        lengths = torch.tensor([99, 71])
        expected = ops.attention(q, k, v, lengths=lengths)
        expected_in_training = ops.attention(*leaves((q, k, v)), lengths=lengths)
        for b, n in enumerate(lengths.tolist()):
            k[b, :, n:], v[b, :, n:] = math.nan, math.inf
        assert torch.equal(ops.attention(q, k, v, lengths=lengths, backend="cpu"), expected)
        leaf_q, leaf_k, leaf_v = leaves((q, k, v))
        out = ops.attention(leaf_q, leaf_k, leaf_v, lengths=lengths, backend="cpu")
        assert torch.equal(out, expected_in_training)
        out.sum().backward()
        for leaf in (leaf_q, leaf_k, leaf_v):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


def test_large_scores(cpu_isa: str) -> None:
    for dtype in HALVES:
        q, k, v = qkv(1, 2, 2, 80, 80, 16, dtype)
        q, k = q * 100, k * 100  # scores of some 1e4
        out = ops.attention(q, k, v, backend="cpu")
        # Nearly all the weight is on one key; where two tie, 2^-24 of the score remains as error.
        exact = ops.attention(q.double(), k.double(), v.double(), backend="torch")
        assert relative_error(out, exact) < (2e-3 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [512.0, 1024.0, 65536.0])
def test_scores_far_from_zero(size: float, dtype: torch.dtype, cpu_isa: str) -> None:
    """size^2 plus a little: what distinguishes the keys must not be rounded away, nor overflow."""
    keys = torch.arange(64.0)
    q, k, v, dout = (torch.randn(1, 2, 64, 16, dtype=torch.float64) for _ in range(4))
    q[..., 2:] = k[..., 2:] = 0
    q[..., 0], q[..., 1] = size, 1
    # Exact in bf16, their products in fp32.
    k[..., 0] = size if size < 65536 else size * (1 + keys / 128)
    k[..., 1] = keys % 4 if size < 65536 else 0

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        out = ops.attention(*leaves, scale=1.0, backend=backend)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout.bfloat16().to(dtype))
        # Those of dq along large equal keys cancel.
        return [out.detach(), dq[..., 2:], dk[..., 1:], dv]

    for found, expected in zip(run(dtype, "cpu"), run(torch.float64, "torch")):
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


def test_rising_scores_leave_nothing_of_the_earlier_ones(cpu_isa: str) -> None:
    for dtype in HALVES:
        q, k, v = qkv(1, 1, 1, 70, 200, 16, dtype)
        q, k = q.abs(), k.abs() * torch.arange(1, 201)[:, None].to(dtype)
        out = ops.attention(q, k, v, causal=False, backend="cpu")
        exact = ops.attention(q.double(), k.double(), v.double(), causal=False, backend="torch")
        assert relative_error(out, exact) < (1e-4 if dtype == torch.float32 else 8e-3)


def test_padding_of_a_softcap_stays_finite(cpu_isa: str) -> None:
    # Scratch memory that held NaN before: only what was written may be used.
    for dtype in HALVES:
        q, k, v = leaves(qkv(1, 1, 1, 5, 7, 8, dtype))
        junk = [torch.full((1 << 16,), math.nan) for _ in range(8)]
        del junk
        ops.attention(q, k, v, softcap=1.5, backend="cpu").sum().backward()
        for leaf in (q, k, v):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


def test_threads_change_nothing(cpu_isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        for dtype in HALVES:
            shapes = ((1, 2, 1, 300, 900, 32), (3, 4, 2, 65, 65, 24), (1, 4, 2, 1, 2000, 64))
            for shape, masked in itertools.product(shapes, (None, "bool", "added")):
                inputs = qkv(*shape, dtype)
                options: dict[str, Any] = {}
                if masked == "bool":
                    options["mask"] = torch.rand(shape[3:5]) < 0.8
                elif masked == "added":
                    options["mask"] = torch.randn(shape[1], *shape[3:5]).to(dtype)
                results = []
                for n in (1, 2, 3):
                    torch.set_num_threads(n)
                    q, k, v = leaves(inputs)
                    out = ops.attention(q, k, v, **options, backend="cpu")
                    results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(threads)


def test_the_layout_of_a_projection_is_kept() -> None:
    packed = torch.randn(2, 50, 3, 4, 32)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = ops.attention(q, k, v, backend="cpu")
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, ops.attention(q, k, v, backend="torch"), atol=2e-6, rtol=0)


def test_saves_the_output_and_the_log_sum_exp() -> None:
    q, k, v = leaves(qkv(1, 2, 2, 64, 64, 16))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.attention(q, k, v, backend="cpu")
    extra = [t for t in saved if all(t.data_ptr() != x.data_ptr() for x in (q, k, v))]
    # The log-sum-exp in two parts, or its rounding would be most of the gradients' error.
    assert sorted(t.numel() for t in extra) == [2 * 2 * 64, out.numel()]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_all_options_crossed(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    b, t, s = draw(st.integers(1, 2)), draw(st.integers(0, 70)), draw(st.integers(0, 90))
    d = draw(st.one_of(st.integers(1, 40), st.integers(41, 256)))
    dtype = draw(st.sampled_from(HALVES))
    h = kv_heads * group
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    offsets = st.integers(-10, 100)
    match draw(st.sampled_from(["default", "int", "tensor", "per row"])):
        case "int":
            options["q_offset"] = draw(offsets)
        case "tensor":
            options["q_offset"] = torch.tensor(draw(offsets))
        case "per row":
            options["q_offset"] = torch.tensor([draw(offsets) for _ in range(b)])
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1.5, 1.5)) / math.sqrt(d)
    if draw(st.booleans()):
        options["lengths"] = torch.tensor([draw(st.integers(0, s)) for _ in range(b)])
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 50))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.5, 20))
    if draw(st.booleans()):
        options["sinks"] = torch.randn(h)
    if draw(st.booleans()):
        options["alibi"] = torch.rand(h)
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    shape = draw(st.sampled_from([(s,), (t, s), (b, 1, 1, s), (1, h, t, s)]))
    if kind == "bool":
        options["mask"] = torch.rand(shape) < 0.7
    elif kind == "float":
        options["mask"] = torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -torch.inf)
    _extension.set_cpu_isa(draw(st.sampled_from(_extension.available_cpu_isas())))
    try:
        inputs = qkv(b, h, kv_heads, t, s, d, dtype)
        found, plain = leaves(inputs), leaves(inputs)
        y = ops.attention(*found, **options, backend="cpu")
        p = ops.attention(*plain, **options, backend="torch")
        # Rounded inputs to products of bf16 and fp16 sums: a few of their units; fp32: of 16 terms.
        tolerance = {"atol": 4e-6, "rtol": 2e-5}
        if dtype != torch.float32:
            tolerance = {"atol": 8 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(y, p, **tolerance)
        dout = torch.randn(y.shape).to(dtype)
        y.backward(dout)
        p.backward(dout)
        for f, e in zip(found, plain):
            scale = 1 + (0 if e.grad is None or e.grad.numel() == 0 else e.grad.abs().max().item())
            torch.testing.assert_close(f.grad, e.grad, atol=tolerance["atol"] * scale, rtol=2e-2)
    finally:
        _extension.set_cpu_isa(_extension.available_cpu_isas()[-1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3)}, ValueError, "q must have 4 dimensions"),
        ({"k": torch.zeros(1, 2, 4, 8).half()}, TypeError, "k must have q's dtype"),
        ({"v": torch.zeros(1, 2, 5, 8)}, ValueError, "same shape"),
        ({"q": torch.zeros(1, 3, 4, 8)}, ValueError, "multiple"),
        ({"window": 0}, ValueError, "window must be positive"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"window": 2.5}, TypeError, "window must be int"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, ValueError, "lengths must have shape"),
        ({"lengths": torch.zeros(1)}, TypeError, "lengths must be a tensor of integers"),
        ({"q_offset": True}, TypeError, "q_offset must be"),
        ({"mask": torch.zeros(3, 3)}, ValueError, "mask must be broadcastable"),
        ({"mask": torch.zeros(4, 4, dtype=torch.int64)}, TypeError, "mask must be bool"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape"),
        ({"alibi": [1.0, 2.0]}, TypeError, "alibi must be a torch.Tensor"),
        ({"scale": "1"}, TypeError, "scale must be a float"),
        ({"causal": 1}, TypeError, "causal must be a bool"),
        ({"lengths": torch.tensor([9])}, ValueError, r"lengths must lie in 0\.\.4, got 9"),
        ({"lengths": torch.tensor([-2])}, ValueError, r"lengths must lie in 0\.\.4, got -2"),
        ({"softcap": 1e-50}, ValueError, "softcap must lie between"),
        ({"softcap": math.inf}, ValueError, "softcap must lie between"),
        ({"q_offset": 2**70}, ValueError, "q_offset must lie between"),
        ({"q_offset": 2**62}, ValueError, "q_offset must lie between"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {name: torch.zeros(1, 2, 4, 8) for name in "qkv"} | change
    for backend in (None, "torch"):
        with pytest.raises(error, match=message):
            ops.attention(**arguments, backend=backend)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_beyond_every_position_hides_nothing(causal: bool) -> None:
    q, k, v = qkv(1, 1, 1, 5, 7, 8)
    expected = ops.attention(q, k, v, causal=causal)
    for window in (2**63 - 1, 2**70):
        for backend in (None, "torch"):
            found = ops.attention(q, k, v, causal=causal, window=window, backend=backend)
            torch.testing.assert_close(found, expected)


def test_compiles_without_a_break() -> None:
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    inputs = qkv(1, 2, 1, 20, 20, 16)
    found, eager = leaves(inputs), leaves(inputs)
    y, z = compiled(*found, window=7), ops.attention(*eager, window=7)
    assert torch.equal(y, z)
    for f, e in zip(torch.autograd.grad(y.sum(), found), torch.autograd.grad(z.sum(), eager)):
        assert torch.equal(f, e)


def test_compiles_with_one_tensor_given_twice() -> None:
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    q, k, _ = qkv(1, 2, 1, 20, 20, 16)
    found, eager = leaves((q, k)), leaves((q, k))
    y, z = compiled(*found, found[1]), ops.attention(*eager, eager[1])
    assert torch.equal(y, z)
    for f, e in zip(torch.autograd.grad(y.sum(), found), torch.autograd.grad(z.sum(), eager)):
        assert torch.allclose(f, e, rtol=0, atol=1e-6)  # of k: the sum of two in either order


def test_gradients_of_gradients_go_through_the_reference() -> None:
    q, k, v = leaves(qkv(1, 1, 1, 4, 4, 5))
    (dq,) = torch.autograd.grad(ops.attention(q, k, v).square().sum(), q, create_graph=True)
    (found,) = torch.autograd.grad(dq.sum(), v)
    options = (True, None, None, None, None, 0, 0.0, None, None, 1 / math.sqrt(5))
    (dq,) = torch.autograd.grad(reference(q, k, v, *options).square().sum(), q, create_graph=True)
    (expected,) = torch.autograd.grad(dq.sum(), v)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
