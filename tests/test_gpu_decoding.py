"""Recurrent layers, decoding and generation on the GPU. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_checks import DTYPES

import lmfast
from lmfast import _dispatch
from lmfast.generation import Generator, static_step
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel
from lmfast.testing import Sample, relative_error

pytestmark = pytest.mark.gpu

RECURRENT = ("elman_rnn", "lstm", "gru")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_decode_attention_in_a_graph_that_is_replayed(backend: str) -> None:
    """One captured step serves every length: new tokens and lengths are copied in."""
    new = [normal(2, heads, 40, 64) for heads in (4, 2, 2)]
    tables = lmfast.ops.rope_tables(64, 64, device="cuda")

    def storage() -> tuple[torch.Tensor, ...]:
        return torch.zeros(2, 2, 2, 64, 64, device="cuda", dtype=new[0].dtype).unbind()

    static, lengths = [t[:, :, :1].clone() for t in new], torch.tensor([1, 9], device="cuda")
    keys, values = storage()

    def step() -> torch.Tensor:
        return lmfast.ops.decode_attention(
            *(*static, keys, values, lengths, *tables), backend=backend
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    expected_storage = storage()
    for t in range(40):
        for s, n in zip(static, new, strict=True):
            s.copy_(n[:, :, t : t + 1])
        graph.replay()
        expected = lmfast.ops.decode_attention(
            *(*(n[:, :, t : t + 1] for n in new), *expected_storage, lengths, *tables),
            backend=backend,
        )
        assert torch.equal(out, expected)
        lengths += 1
    assert torch.equal(keys, expected_storage[0])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_attention_on_eight_bit_floats(backend: str) -> None:
    """As on the numbers that they stand for."""
    q = normal(3, 8, 1, 128)
    keys, values = (normal(3, 2, 5000, 128).to(torch.float8_e4m3fn) for _ in range(2))
    lengths = torch.tensor([5000, 3, 0], device="cuda")
    found = lmfast.ops.cached_attention(q, keys, values, lengths, backend=backend)
    wide = (t.double() for t in (keys, values))
    exact = lmfast.ops.cached_attention(q.double(), *wide, lengths, backend="torch")
    assert relative_error(found, exact) <= torch.finfo(q.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_tokens_are_rounded_to_eight_bit_floats(dtype: torch.dtype) -> None:
    """To the bit as the reference, over all magnitudes and what is beyond."""
    exponents = torch.arange(-16, 12, device="cuda").repeat_interleave(8)
    x = (normal(1, 1, 1, len(exponents), dtype=torch.float32) * 2.0**exponents).to(dtype)
    x[..., 5], x[..., 77] = torch.nan, torch.inf
    stored = []
    for backend in ("cuda", "triton", "torch"):
        keys, values = (torch.zeros(1, 1, 9, x.shape[3], device="cuda") for _ in range(2))
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
        lengths = torch.tensor([4], device="cuda")
        out = lmfast.ops.decode_attention(x, x, -x, keys, values, lengths, backend=backend)
        assert out.isnan().any()
        stored.append((keys.view(torch.uint8), values.view(torch.uint8)))
    pairs = (zip(found, stored[-1], strict=True) for found in stored[:-1])
    for found, expected in (pair for both in pairs for pair in both):
        nan = (expected & 127) == 127
        assert torch.equal((found & 127) == 127, nan)
        assert torch.equal(found[~nan], expected[~nan])


def check_recurrent(name: str, sample: Sample, dtype: torch.dtype, backend: str) -> None:
    """As close to float64 as a loop in the same dtype, forward and backward."""
    op, found = _dispatch.ops()[name], []
    for function, s in (
        (op.implementations[backend].forward, sample),
        (op.peer, sample),
        (op.reference, sample.to_fp64()),
    ):
        args = list(op.check(*s.args, **s.kwargs))
        leaves = [t.detach().requires_grad_() for t in args[:7] if t is not None]
        made = iter(leaves)
        args[:7] = [None if t is None else next(made) for t in args[:7]]
        outputs = torch.utils._pytree.tree_leaves(function(*args))
        outputs = [o for o in outputs if o.requires_grad]
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        found.append([*outputs, *grads])
    for value, plain, exact in zip(*found, strict=True):
        unit = torch.finfo(dtype).eps
        assert relative_error(value, exact) <= 1.5 * relative_error(plain, exact) + unit


@pytest.mark.parametrize("backend", ["cuda", "torch"])  # the persistent kernels, cuDNN
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str, dtype: torch.dtype, backend: str) -> None:
    op, taken = _dispatch.ops()[name], 0
    for sample in op.sample_inputs("cuda", dtype):
        args = op.check(*sample.args, **sample.kwargs)
        if args[-2] == "gru_textbook" or op.implementations[backend].supports(*args):
            continue
        check_recurrent(name, sample, dtype, backend)
        taken += 1
    assert taken > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize(("hidden", "batch"), [(256, 3), (512, 64), (768, 200), (1024, 16)])
def test_persistent_kernels_at_full_size(
    name: str, hidden: int, batch: int, dtype: torch.dtype
) -> None:
    """Every tile, several groups of the batch, lengths: what fits is not to be refused."""
    gates = {"lstm": 4, "gru": 3, "elman_rnn": 1}[name]
    scale = hidden**-0.5
    weights = tuple(
        normal(*shape, dtype=torch.float32).mul(scale).to(dtype)
        for shape in ((gates * hidden, 64), (gates * hidden, hidden), *((gates * hidden,),) * 2)
    )
    x, lengths = normal(batch, 9, 64, dtype=dtype), torch.randint(0, 10, (batch,), device="cuda")
    for options in ({}, {"lengths": lengths}, {"reverse": True}):
        sample = Sample("", (x, None, weights), options)
        op = _dispatch.ops()[name]
        args = op.check(*sample.args, **sample.kwargs)
        assert op.implementations["cuda"].supports(*args) is None
        check_recurrent(name, sample, dtype, "cuda")


@pytest.mark.parametrize("clusters", ["1", "0"])
def test_recurrent_operators_pass_opcheck(clusters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMFAST_RECURRENT_CLUSTERS", clusters)
    sizes, hidden = torch.tensor([3, 3, 1]), 16
    projected, w = normal(7, 4 * hidden), normal(4 * hidden, hidden).div(4)
    states, lstm = normal(2, 3, hidden).unbind(), 2
    forward = torch.ops.lmfast.recurrent_forward.default
    arguments = (projected, w, None, *states, sizes, 3, lstm, False, True)
    torch.library.opcheck(forward, arguments)
    y, h_n, c_n, gates, cells = forward(*arguments)
    torch.library.opcheck(
        torch.ops.lmfast.recurrent_backward.default,
        (y, h_n, c_n, y, gates, cells, w, *states, sizes, 3, lstm, False),
    )


def test_persistent_kernels_in_a_graph() -> None:
    weights = normal(512, 64).div(8), normal(512, 128).div(12)
    x = normal(5, 7, 64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = lmfast.ops.lstm(x, None, weights, backend="cuda")[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lmfast.ops.lstm(x, None, weights, backend="cuda")[0]
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize(("hidden", "batch"), [(64, 5), (256, 64), (512, 130)])
def test_clusters_and_the_whole_gpu_agree(
    name: str, hidden: int, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kernels of a layer, one within clusters, one across the GPU: to rounding, and the same
    bits every run. Lengths, states, both directions."""
    gates = {"lstm": 4, "gru": 3, "elman_rnn": 1}[name]
    shapes = ((gates * hidden, 24), (gates * hidden, hidden), *((gates * hidden,),) * 2)
    weights = [normal(*s, dtype=torch.float32).mul(hidden**-0.5).to(dtype) for s in shapes]
    x, lengths = normal(batch, 13, 24, dtype=dtype), torch.randint(1, 14, (batch,), device="cuda")
    dy = normal(batch, 13, hidden, dtype=dtype)
    for options in ({}, {"lengths": lengths}, {"lengths": lengths, "reverse": True}):
        found = []
        for clusters in ("1", "0", "1"):
            monkeypatch.setenv("LMFAST_RECURRENT_CLUSTERS", clusters)
            leaves = [t.detach().requires_grad_() for t in (x, *weights)]
            op = getattr(lmfast.ops, name)
            y = op(leaves[0], None, tuple(leaves[1:]), backend="cuda", **options)[0]
            found.append([y, *torch.autograd.grad(y, leaves, dy)])
        for inside, across, again in zip(*found, strict=True):
            assert torch.equal(inside, again)
            assert relative_error(inside, across.double()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 50, "top_p": 0.9}])
@pytest.mark.parametrize("kind", ["decoder", "lstm", "elman", "gru", "llama", "llama, patched"])
def test_generation_by_a_graph_is_that_of_the_loop(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model: Any
    if kind.startswith("llama"):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.LlamaForCausalLM(config).eval().cuda()
        if kind.endswith("patched"):
            lmfast.patch(model)
    elif kind == "decoder":
        model = DecoderLanguageModel(1000, 128, 4, 3, 0, num_kv_heads=2, mlp="swiglu").cuda()
    else:
        model = RecurrentLanguageModel(1000, 128, 2, 0, cell=kind).cuda()
    ids = torch.randint(1, 1000, (3, 33), device="cuda")
    results = []
    for graphs in ("1", "0"):
        monkeypatch.setenv("LMFAST_CUDA_GRAPHS", graphs)
        generator = Generator(model)
        assert static_step.takes(generator.runner)
        if options:
            options["generator"] = torch.Generator("cuda").manual_seed(5)
        results.append(generator.generate(ids, max_new_tokens=40, eos_token_id=7, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["waits for the host", "experts"])
def test_what_cannot_be_captured_runs_all_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from transformers_models import make

    model: Any = make("mixtral" if kind == "experts" else "llama").eval().cuda()
    if kind == "waits for the host":
        model.lm_head.register_forward_hook(lambda *a: (float(a[2].sum()), None)[1])
    ids = torch.randint(1, 96, (3, 12), device="cuda")
    generator = Generator(model)
    drawn = []
    for _ in range(2):  # eagerly on static buffers, then by the loop
        draws = torch.Generator("cuda").manual_seed(5)
        options: dict[str, Any] = {"do_sample": True, "top_k": 20, "generator": draws}
        drawn.append(generator.generate(ids, max_new_tokens=20, **options))
        torch.rand(3, device="cuda")  # the default generator still draws
    assert torch.equal(*drawn)
    reason = "wait for the host" if kind == "experts" else "its capture failed"
    assert f"no CUDA graphs: {reason}" in generator.explain().replace(
        "the products of experts ", ""
    )
