"""Every op on the GPU, by each of its GPU backends. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_checks import (
    DTYPES,
    call,
    call_on_copies,
    check_gradients,
    check_values,
    gradients,
    ops_with,
)

import lmfast
from lmfast import _dispatch
from lmfast._dispatch import Op
from lmfast.testing import Sample, relative_error

pytestmark = pytest.mark.gpu

RECURRENT = ("elman_rnn", "lstm", "gru")  # they differentiate themselves: see the test at the end
PAIRS = [
    (op, backend)
    for backend in ("triton", "cuda")
    for op in ops_with(backend)
    if op.name not in RECURRENT
]
EVERY_PAIR = pytest.mark.parametrize(
    ("op", "backend"), PAIRS, ids=[f"{op.name}-{backend}" for op, backend in PAIRS]
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def samples(op: Op, backend: str, dtype: torch.dtype) -> list[Sample]:
    """Those that the backend takes; some of them, at least."""
    supports = op.implementations[backend].supports
    found = [
        sample
        for sample in op.sample_inputs("cuda", dtype)
        if supports(*op.check(*sample.args, **sample.kwargs)) is None
    ]
    assert found, f"{op.name} has no sample for {backend}"
    return found


def all_outputs(op: Op, sample: Sample, backend: str) -> list[torch.Tensor]:
    return [*call(op, sample, backend), *gradients(op, sample, backend)]


@EVERY_DTYPE
@EVERY_PAIR
def test_values(op: Op, backend: str, dtype: torch.dtype) -> None:
    for sample in samples(op, backend, dtype):
        check_values(op, sample, backend)


@EVERY_DTYPE
@EVERY_PAIR
def test_gradients(op: Op, backend: str, dtype: torch.dtype) -> None:
    if op.implementations[backend].backward is None:
        pytest.skip(f"{op.name} has no gradient on {backend}")
    for sample in samples(op, backend, dtype):
        check_gradients(op, sample, backend)


def norm_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Rows kept in registers, looped over, unaligned, many, and in several dimensions."""
    for rows, width in ((5, 4096), (3, 12320), (2, 16385), (2, 65536), (20011, 64), (3, 8191)):
        x = normal(rows, width, dtype=dtype)
        yield Sample(f"{rows}x{width}", (x, normal(width, dtype=dtype)))
    yield Sample("unaligned", (normal(64, 4097, dtype=dtype)[:, 1:], normal(4096, dtype=dtype)))
    heads = normal(2, 33, 6, 128, dtype=dtype).transpose(1, 2)
    yield Sample("heads", (heads, normal(128, dtype=dtype)))


@EVERY_DTYPE
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_norm_of_every_kind_of_row(backend: str, dtype: torch.dtype) -> None:
    norm, add_norm = _dispatch.ops()["rms_norm"], _dispatch.ops()["add_rms_norm"]
    for sample in norm_samples(dtype):
        x, weight = sample.args
        both = Sample(sample.name, (x, torch.randn_like(x), weight))
        for op, s in ((norm, sample), (add_norm, both)):
            check_values(op, s, backend)
            check_gradients(op, s, backend)


@EVERY_DTYPE
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_of_model_sizes(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    op = _dispatch.ops()["rope"]
    for heads, kv_heads, length, head_dim, rotary in (
        (32, 8, 130, 128, 128),
        (12, 12, 33, 64, 64),
        (8, 1, 7, 256, 64),
        (3, 2, 5, 80, 20),
    ):
        tables = lmfast.ops.rope_tables(4096, rotary, device="cuda")
        q = normal(2, length, heads, head_dim, dtype=dtype).transpose(1, 2)
        k = normal(2, kv_heads, length, head_dim, dtype=dtype)
        starts = torch.tensor([3900, 0], device="cuda")
        sample = Sample("", (q, k, *tables), {"interleaved": interleaved, "positions": starts})
        check_values(op, sample, backend)
        check_gradients(op, sample, backend)
        expected = call(op, sample, backend)
        inplace = lmfast.ops.rope(
            q.clone(),
            k.clone(),
            *tables,
            interleaved=interleaved,
            positions=starts,
            inplace=True,
            backend=backend,
        )
        assert all(torch.equal(a, b) for a, b in zip(inplace, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_as_close_as_sdpa(dtype: torch.dtype) -> None:
    """At model sizes, forward and backward, beside PyTorch's own fused kernels in the dtype."""
    for length, heads, kv_heads, head_dim in ((1000, 8, 2, 128), (515, 4, 4, 64), (300, 4, 1, 256)):
        q = normal(2, length, heads, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
        k = normal(2, kv_heads, length, head_dim, dtype=dtype).requires_grad_()
        v = normal(2, kv_heads, length, head_dim, dtype=dtype).requires_grad_()
        dout = normal(2, heads, length, head_dim, dtype=dtype)
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        exact = lmfast.ops.attention(*wide, backend="torch")
        exact_grads = torch.autograd.grad(exact, wide, dout.double())
        ours = lmfast.ops.attention(q, k, v, backend="triton")
        grads = torch.autograd.grad(ours, (q, k, v), dout)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        plain_grads = torch.autograd.grad(plain, (q, k, v), dout)
        for g, p, e in zip((ours, *grads), (plain, *plain_grads), (exact, *exact_grads)):
            assert relative_error(g, e) <= 1.5 * relative_error(p, e)


def test_attention_of_more_heads_than_an_axis_of_a_grid_has() -> None:
    """Sequences times heads: 65,535 is the end of all axes but the first."""
    q, k, v = normal(3, 35001, 2, 3, 16).unbind()
    sample = Sample("", (q, k, v))
    check_values(_dispatch.ops()["attention"], sample, "triton")
    check_gradients(_dispatch.ops()["attention"], sample, "triton")


@pytest.mark.parametrize("keys", [257, 8192, 40000])
def test_attention_decodes_on_a_long_cache(keys: int) -> None:
    op = _dispatch.ops()["attention"]
    q = normal(3, 8, 1, 128)
    cache = normal(2, 3, 2, keys, 128)
    lengths = torch.tensor([keys, 3, 0], device="cuda")
    cache[:, 1, :, 3:] = torch.nan
    check_values(op, Sample("", (q, *cache.unbind()), {"lengths": lengths}), "triton")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("keys", [640, 40000])
@pytest.mark.parametrize("group", [1, 4])
def test_cached_attention_on_a_long_paged_cache(keys: int, group: int, backend: str) -> None:
    op = _dispatch.ops()["cached_attention"]
    q = normal(3, 2 * group, 1, 128)
    stored = torch.randint(-127, 128, (2, 4, 2, keys, 128), device="cuda").to(torch.int8)
    scales = torch.rand(2, 4, 2, keys, device="cuda") / 50
    table = torch.randint(4, (3, -(-keys // 64)), device="cuda").int()
    lengths = torch.tensor([keys, 70, 0], device="cuda")
    options = {"key_scales": scales[0], "value_scales": scales[1], "table": table}
    check_values(op, Sample("", (q, *stored.unbind(), lengths), options), backend)
    plain = normal(2, 3, 2, keys, 128)
    plain[:, 1, :, 70:] = torch.nan
    check_values(op, Sample("", (q, *plain.unbind(), lengths)), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_cross_entropy_in_chunks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight gradients over several chunks are summed in fp32: as close as in one."""
    from lmfast.triton import linear_cross_entropy

    hidden, weight = normal(700, 96, dtype=dtype), normal(50257, 96, dtype=dtype) / 10
    targets = torch.randint(50257, (700,), device="cuda")
    op = _dispatch.ops()["linear_cross_entropy"]
    for rows in (700, 256):
        monkeypatch.setattr(linear_cross_entropy, "LOGITS_PER_CHUNK", rows * 50304)
        check_values(op, Sample("", (hidden, weight, targets)), "triton")
        check_gradients(op, Sample("", (hidden, weight, targets)), "triton")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rope_rows_past_the_tables_are_nan(backend: str) -> None:
    cos, sin = lmfast.ops.rope_tables(16, 32, device="cuda")
    q, k = normal(2, 4, 3, 64), normal(2, 2, 3, 64)
    starts = torch.tensor([14, -1], device="cuda")
    lost = torch.tensor([[False, False, True], [True, False, False]], device="cuda")
    for value in lmfast.ops.rope(q, k, cos, sin, positions=starts, backend=backend):
        assert torch.equal(value.isnan(), lost[:, None, :, None].expand_as(value))


@EVERY_PAIR
def test_compiles_into_one_graph(op: Op, backend: str) -> None:
    for sample in samples(op, backend, torch.bfloat16)[:2]:
        torch._dynamo.reset()

        def function(*args: Any, sample: Sample = sample) -> tuple[torch.Tensor, ...]:
            return call_on_copies(op, sample, backend, *args)

        compiled = torch.compile(function, fullgraph=True)
        for got, expected in zip(compiled(*sample.args), function(*sample.args), strict=True):
            assert torch.equal(got, expected)


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@EVERY_PAIR
def test_replays_in_a_cuda_graph(op: Op, backend: str) -> None:
    sample = samples(op, backend, torch.float16)[0]
    graph, results = capture(lambda: all_outputs(op, sample, backend))
    first = sample.args[0]
    first.copy_(torch.randn_like(first))
    graph.replay()
    for got, expected in zip(results, all_outputs(op, sample, backend), strict=True):
        assert torch.equal(got, expected)


@EVERY_PAIR
def test_never_waits_for_the_gpu(op: Op, backend: str) -> None:
    taken = samples(op, backend, torch.bfloat16)
    for sample in taken:
        all_outputs(op, sample, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sample in taken:
            all_outputs(op, sample, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_PAIR
def test_runs_on_the_current_stream(op: Op, backend: str) -> None:
    sample = samples(op, backend, torch.float32)[0]
    expected = call(op, sample, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        first = torch.empty_like(sample.args[0]).copy_(sample.args[0])
        got = call(op, Sample("", (first, *sample.args[1:]), sample.kwargs), backend)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_weight_gradient_has_the_same_bits_every_run(backend: str) -> None:
    op = _dispatch.ops()["rms_norm"]
    sample = Sample("", (normal(5003, 1024), normal(1024)))
    first = gradients(op, sample, backend)
    for _ in range(5):
        again = gradients(op, sample, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@EVERY_PAIR
def test_operators_pass_opcheck(op: Op, backend: str) -> None:
    names = {
        "rms_norm": ("rms_norm", "rms_norm_backward"),
        "add_rms_norm": ("add_rms_norm",),
        "rope": ("rope", "rope_"),
        "swiglu": ("swiglu", "swiglu_backward"),
        "geglu": ("geglu", "geglu_backward"),
        "attention": ("attention", "attention_backward"),
        "cached_attention": ("cached_attention",),
        "sample": ("sample",),
        "linear": ("linear",),
        "lora_linear": ("linear",),
        "quantised_linear": ("quantised_linear", "quantised_linear_backward"),
        "decode_attention": ("decode_attention",) if backend == "cuda" else (),
        "rope_append": ("rope_append",),
        "additive_attention": ("additive_attention", "additive_attention_backward"),
        "linear_recurrence": ("linear_recurrence", "linear_recurrence_backward"),
        "cross_entropy": ("cross_entropy", "cross_entropy_"),
        "linear_cross_entropy": ("linear_cross_entropy",),
    }[op.name]
    x, weight = normal(3, 2, 64), normal(64)
    q, k = normal(2, 2, 3, 64), normal(2, 3, 1, 64).transpose(1, 2)
    cos, sin = lmfast.ops.rope_tables(8, 32, device="cuda")
    starts = torch.tensor([1, 4], device="cuda")
    keys = normal(2, 1, 5, 64)
    options = (True, None, starts, None, None, 0, 0.0, None, None, 0.125)
    out, lse = torch.empty_like(q), torch.zeros(2, 2, 3, device="cuda")
    ids = torch.tensor([[0, 63], [-100, 7], [5, 5]], device="cuda").flatten()
    loss = (-100, 1, 0.1, 0.01)
    slots = torch.tensor([0, 1, 2, 5, 7, 9], device="cuda")
    arguments = {
        "cached_attention": (q, keys, keys, starts, *(None,) * 8),
        "sample": (x.view(6, 64), torch.rand(6, device="cuda", dtype=torch.float64))
        + (torch.ones(1, 8, dtype=torch.float64, device="cuda"), None, None, None, None, True),
        "linear": (x.view(6, 64), normal(65, 64), normal(65), True, None, None, 1.0),
        "quantised_linear": (x, torch.ones(65, 64, device="cuda").to(torch.int8))
        + (torch.rand(65, device="cuda"), None),
        "quantised_linear_backward": (x, torch.ones(64, 9, device="cuda").to(torch.uint8))
        + (torch.rand(64, 3, device="cuda"),),
        "decode_attention": (q[:, :, :1], *q[:, :1, :1].expand(2, 2, 1, 1, 64).unbind(), keys)
        + (keys.clone(), None, None, starts, None, cos, sin, True, *(None,) * 5),
        "rope_append": (q, q[:, :1], q[:, :1], keys, keys.clone(), None, None, slots, None)
        + (cos, sin, starts, 0, True),
        "cross_entropy": (x.view(6, 64), ids, None, *loss, True),
        "cross_entropy_": (x.view(6, 64).clone(), ids, None, *loss),
        "linear_cross_entropy": (x.view(6, 64), normal(65, 64), ids, None, None, None, *loss)
        + (0.0, False, True, True, False),
        "additive_attention": (x.float(), keys[:, 0][:1].expand(3, -1, -1))
        + (keys[:, 0][:1].expand(3, -1, -1), weight.float(), None),
        "additive_attention_backward": (x.float(), None, x.float(), x, x, weight.float(), None)
        + (torch.rand(3, 2, 2, device="cuda"),),
        "linear_recurrence": (x, x.clone(), x[:, 0].clone()),
        "linear_recurrence_backward": (x, x.clone(), x.clone(), None),
        "attention": (q, keys, keys, *options),
        "attention_backward": (q, q, keys, keys, out.zero_(), lse, *options),
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, x.clone(), None, 1e-6),
        "rms_norm_backward": (x, x, weight, 1e-6, x, True),
        "swiglu": (x, None),
        "swiglu_backward": (x, x, x.clone()),
        "geglu": (x, x.clone(), True),
        "geglu_backward": (x[..., :32], x, None, False),
        "rope": (q, k, cos, sin, starts, 0, True, False),
        "rope_": (q, k, cos, sin, None, 2, False),
    }
    for name in names:
        full = f"triton_{name}" if backend == "triton" else name
        torch.library.opcheck(getattr(torch.ops.lmfast, full).default, arguments[name])


def test_automatic_choice_is_a_kernel() -> None:
    x = normal(4, 64)
    assert lmfast.explain("rms_norm", x) in ("cuda", "triton")
    assert lmfast.explain("rms_norm", x.double()) == "torch"
