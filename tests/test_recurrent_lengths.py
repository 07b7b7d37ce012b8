"""Rows of lengths of their own where no size may depend on numbers: in graphs and on meta."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lmfast.nn
from lmfast import ops
from lmfast.models import RecurrentLanguageModel, Seq2Seq, Tagger

LENGTHS = torch.tensor([3, 0, 7, 1, 5])
OPS: dict[str, Any] = {
    "relu": (partial(ops.elman_rnn, nonlinearity="relu"), 1),
    "lstm": (ops.lstm, 4),
    "gru": (ops.gru, 3),
    "textbook GRU": (partial(ops.gru, reset_after=False), 3),
}


def results(leaves: list[Tensor], found: tuple[Tensor, ...]) -> list[Tensor]:
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in found)
    return [*found, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("name", "reverse"), [("relu", True), ("lstm", False), ("gru", True), ("textbook GRU", False)]
)
def test_lengths_in_one_graph_and_on_meta(name: str, reverse: bool) -> None:
    torch._dynamo.reset()
    layer, gates = OPS[name]
    batch, steps, width, hidden = 5, 7, 3, 6
    shapes = [(gates * hidden, width), (gates * hidden, hidden), (gates * hidden,)]
    leaves = [torch.randn(s).requires_grad_() for s in ((batch, steps, width), *shapes)]
    states = [torch.randn(batch, hidden).requires_grad_() for _ in range(1 + (name == "lstm"))]

    def call(x: Tensor, *rest: Tensor, lengths: Tensor = LENGTHS) -> tuple[Tensor, ...]:
        weights, given = rest[:3], rest[3:]
        state = given if name == "lstm" else given[0]
        y, final = layer(x, state, weights, lengths=lengths, reverse=reverse)
        return y, *(final if name == "lstm" else (final,))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    given = [*leaves, *states]
    for f, e in zip(*(results(given, c(*given)) for c in (compiled, call)), strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0)  # the same operators
    nothing = torch.zeros(batch, dtype=torch.int64)
    for f, e in zip(compiled(*given, lengths=nothing)[1:], states, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0)
    for f, e in zip(
        call(*(t.to("meta") for t in given), lengths=LENGTHS.to("meta")), call(*given), strict=True
    ):
        assert f.is_meta
        assert f.shape == e.shape


def test_opcheck() -> None:
    x, w = torch.randn(5, 7, 3, requires_grad=True), torch.randn(24, 3, requires_grad=True)
    u, state = torch.randn(24, 6, requires_grad=True), torch.randn(5, 6)
    rest = (None, None, LENGTHS, "lstm", True, "reference")
    args = (x, state, None, w, u, *rest)
    forward = torch.ops.lmfast.recurrent_padded.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    torch.library.opcheck(forward, detached, test_utils=tests)
    wanted = [True, False, False, True, True, False, False]
    grads = tuple(torch.randn_like(t) for t in forward(*detached))
    torch.library.opcheck(
        torch.ops.lmfast.recurrent_padded_backward.default, (*grads, wanted, *detached),
        test_utils=tests,
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "tagger": partial(Tagger, 20, 9, num_layers=2),
    "attention": partial(Seq2Seq, 20, 9),
}


def model_of(name: str, cell: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    ids, targets = (
        torch.randint(1, 20, (3, 6)),
        torch.randint(1, 9, (3, 6 if name == "tagger" else 2)),
    )
    model = MODELS[name](cell=cell, emb_dim=4, hidden_dim=8)
    names = (
        ("ids", "tags", "lengths") if name == "tagger" else ("source", "target", "source_lengths")
    )
    return model, dict(zip(names, (ids, targets, torch.tensor([6, 2, 4])))), targets


@pytest.mark.filterwarnings("ignore:The tensor attributes self")
@pytest.mark.parametrize(
    ("name", "cell"),
    [("tagger", "lstm"), ("attention", "gru")],
)
def test_models_compile_export_and_have_shapes(name: str, cell: str) -> None:
    torch._dynamo.reset()
    model, given, targets = model_of(name, cell)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    leaves = list(model.parameters())
    both = []
    for loss in (compiled, model.loss):
        value = loss(**given)
        both.append([value, *torch.autograd.grad(value, leaves)])
    for f, e in zip(*both, strict=True):
        # fp32, layer by layer in place of all packed: other orders of summation.
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)
    if name == "tagger":
        del given["tags"]
    model.eval()
    program = torch.export.export(model, (), given)
    torch.testing.assert_close(program.module()(**given), model(**given), rtol=1e-5, atol=1e-6)
    shapes = {k: t.to("meta") for k, t in given.items()}
    assert copy.deepcopy(model).to("meta")(**shapes).shape == (*targets.shape, 9)


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
@torch.no_grad()
def test_exports_for_any_batch_and_length() -> None:
    model, _, _ = model_of("tagger", "lstm")
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    free = ({0: batch, 1: time}, {0: batch})
    example = (torch.randint(1, 20, (3, 6)), torch.tensor([6, 2, 4]))
    program = torch.export.export(model.eval(), example, dynamic_shapes=free).module()
    for rows, lengths in ((2, [1, 9]), (17, [5] * 16 + [31])):
        ids = torch.randint(1, 20, (rows, lengths[-1]))
        given = (ids, torch.tensor(lengths))
        torch.testing.assert_close(program(*given), model(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", ["elman", "lstm"])
@torch.no_grad()
def test_a_prompt_of_ragged_rows_compiles_in_one_graph(cell: str) -> None:
    torch._dynamo.reset()
    model = RecurrentLanguageModel(11, 6, 2, 0, cell=cell)
    ids, lengths = torch.randint(1, 11, (3, 8)), torch.tensor([8, 1, 5])
    compiled = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    for f, e in zip(*(s(ids, model.new_state(3), lengths) for s in (compiled, model.step))):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The tensor attributes self")
@pytest.mark.parametrize(("mode", "bidirectional"), [("LSTM", True), ("GRU", False)])
def test_packed_sequences_in_one_graph(
    mode: str, bidirectional: bool, needs_cpu_kernels: None
) -> None:
    torch._dynamo.reset()
    layer = getattr(lmfast.nn, mode)(5, 7, 2, batch_first=True, bidirectional=bidirectional)
    x, lengths = torch.randn(4, 6, 5), torch.tensor([3, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    both = []
    for call in (compiled, layer):
        data = packed.data.clone().requires_grad_()
        y, final = call(packed._replace(data=data))
        states = final if mode == "LSTM" else (final,)
        both.append(results([data, *layer.parameters()], (y.data, *states)))
    for f, e in zip(*both, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0)  # the same operators
    program = torch.export.export(layer, (packed,)).module()
    torch.testing.assert_close(program(packed)[0].data, layer(packed)[0].data, rtol=0, atol=0)
