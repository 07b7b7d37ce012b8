"""Recurrent layers, decoding and generation on the GPU. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_checks import DTYPES

import lmfast
from lmfast import _dispatch
from lmfast.generation import Generator, static_step
from lmfast.models import DecoderLanguageModel
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


def test_persistent_kernels_in_a_graph() -> None:
    weights = normal(512, 64).div(8), normal(512, 128).div(12)
    x = normal(5, 7, 64)
    side = torch.cuda.Stream()
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


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 50, "top_p": 0.9}])
def test_generation_by_a_graph_is_that_of_the_loop(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = DecoderLanguageModel(1000, 128, 4, 3, 0, num_kv_heads=2, mlp="swiglu").cuda()
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
