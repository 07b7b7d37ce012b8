"""Recurrent and attention modules in one graph: torch.compile with gradients, torch.export."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import lmfast.nn
from lmfast.models import RecurrentLanguageModel
from lmfast.nn import BahdanauAttention, LuongAttention, MinGRU, MinLSTM

X, STATE = (3, 6, 5), (3, 7)


MODULES: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "RNN": (lambda: lmfast.nn.RNN(5, 7, 2, batch_first=True), [X, (2, *STATE)]),
    "LSTM": (lambda: lmfast.nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True), [X]),
    "GRU": (lambda: lmfast.nn.GRU(5, 7, 2, bidirectional=True), [X]),
    "TextbookGRU": (lambda: lmfast.nn.TextbookGRU(5, 7, batch_first=True), [X]),
    "ElmanRNN": (lambda: lmfast.nn.ElmanRNN(5, 2), [X]),
    "RNNCell": (lambda: lmfast.nn.RNNCell(5, 7), [(3, 5), STATE]),
    "GRUCell": (lambda: lmfast.nn.GRUCell(5, 7), [(3, 5), STATE]),
    "textbook GRUCell": (lambda: lmfast.nn.GRUCell(5, 7, reset_after=False), [(3, 5), STATE]),
    "LSTMCell": (lambda: lmfast.nn.LSTMCell(5, 7), [(3, 5)]),
    "MinGRU": (lambda: MinGRU(5, 7), [X, STATE]),
    "MinLSTM": (lambda: MinLSTM(5, 7), [X, STATE]),
    "BahdanauAttention": (lambda: BahdanauAttention(7, 5, 8), [STATE, X]),
    "LuongAttention": (lambda: LuongAttention(7, 5, "general"), [(3, 4, 7), X]),
}
EVERY_MODULE = pytest.mark.parametrize("name", list(MODULES))


def flat(value: Any) -> list[Tensor]:
    return [t for v in value for t in flat(v)] if isinstance(value, (tuple, list)) else [value]


def gradients(function: Any, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = flat(function(*leaves))
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


@EVERY_MODULE
def test_compiles_in_one_graph(name: str, needs_cpu_kernels: None) -> None:
    torch._dynamo.reset()
    make, shapes = MODULES[name]
    module, inputs = make(), [torch.randn(s) for s in shapes]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(f, module, inputs) for f in (compiled, module))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["RNN", "LSTM", "GRU"])
@torch.no_grad()
def test_steps_and_what_torchs_layer_runs_compile_in_one_graph(
    mode: str, dtype: torch.dtype, needs_cpu_kernels: None
) -> None:
    if (mode, dtype) == ("LSTM", torch.float64) and torch.__version__.startswith("2.11."):
        pytest.skip("PyTorch 2.11 gives a compiled nn.LSTM's final states one dimension too many")
    torch._dynamo.reset()
    layer = getattr(lmfast.nn, mode)(5, 7, 2, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, h, c = (torch.randn(s, dtype=dtype) for s in ((1, 3, 5), (2, *STATE), (2, *STATE)))
    hx = (h, c) if mode == "LSTM" else h
    for f, e in zip(flat(compiled(x, hx)), flat(layer(x, hx)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


# nn.RNNBase keeps its weights in a list beside the parameters.
@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
@EVERY_MODULE
@torch.no_grad()
def test_exports(name: str, needs_cpu_kernels: None) -> None:
    make, shapes = MODULES[name]
    module, inputs = make().eval(), tuple(torch.randn(s) for s in shapes)
    program = torch.export.export(module, inputs)
    for f, e in zip(flat(program.module()(*inputs)), flat(module(*inputs)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


# Hidden sizes of 32 have a loop in bf16 for batches of 16 and more.
@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
@pytest.mark.parametrize(
    "make",
    [
        lambda: lmfast.nn.RNN(5, 32, 2, batch_first=True),
        lambda: lmfast.nn.LSTM(5, 7, bidirectional=True, batch_first=True),
        lambda: lmfast.nn.LSTM(5, 7, batch_first=True, proj_size=3),
        lambda: lmfast.nn.TextbookGRU(5, 7, batch_first=True),
        lambda: lmfast.nn.ElmanRNN(5, 2),
    ],
    ids=["RNN", "LSTM both ways", "LSTM projected", "TextbookGRU", "ElmanRNN"],
)
@torch.no_grad()
def test_exports_for_any_batch_and_length(make: Any, needs_cpu_kernels: None) -> None:
    module = make().eval()
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(module, (torch.randn(X),), dynamic_shapes=(free,))
    for batch, time in ((2, 3), (17, 40)):
        x = torch.randn(batch, time, 5)
        for f, e in zip(flat(program.module()(x)), flat(module(x)), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


@EVERY_MODULE
def test_checkpointed(name: str) -> None:
    make, shapes = MODULES[name]
    module, inputs = make(), [torch.randn(s) for s in shapes]
    again = partial(checkpoint, module, use_reentrant=False)
    for f, e in zip(*(gradients(f, module, inputs) for f in (again, module)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


def test_compiled_layers_are_not_compiled_again_for_every_batch(needs_cpu_kernels: None) -> None:
    torch._dynamo.reset()
    layer = lmfast.nn.LSTM(5, 7, bidirectional=True, batch_first=True)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (50, 60, 70, 80, 90):
        compiled(torch.randn(batch, 6, 5))
    assert counter.frame_count <= 3  # one for the first batch, one or two for all others


@pytest.mark.parametrize("cell", ["elman", "lstm", "min_gru"])
def test_a_models_loss_compiles_in_one_graph(cell: str, needs_cpu_kernels: None) -> None:
    torch._dynamo.reset()
    model = RecurrentLanguageModel(11, 6, 2, 0, cell=cell)
    ids = torch.randint(1, 11, (3, 8))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    results = []
    for loss in (compiled, model.loss):
        value = loss(ids[:, :-1], ids[:, 1:])
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for f, e in zip(*results, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)
