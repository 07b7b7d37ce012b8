"""Stacks as a wavefront: the numbers of one layer after the other, for any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lmfast
import lmfast.nn
from lmfast.ops import _recurrent_stack
from lmfast.ops._recurrent import cpu_layer
from lmfast.ops._recurrent_reference import CELLS, GATES, Layer, Loop
from lmfast.ops._recurrent_stack import cpu_stack, runs_as_wavefront

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
# B, T, D, H, layers: one row, several pieces of steps and an odd last one, fewer steps than one.
SHAPES = [(1, 70, 3, 33, 2), (3, 40, 64, 20, 3), (2, 5, 7, 16, 4), (1, 36, 64, 64, 2)]


def arguments(
    cell: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Layer]]:
    """x and the layers; right-multiplied weights in one."""
    batch, steps, width, hidden, count = shape

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, dtype=torch.float64) * size[-1] ** -0.5).to(dtype)

    gates, layers = GATES[cell] * hidden, []
    for i in range(count):
        w_ih = normal(gates, hidden if i else width)
        w_hh = normal(hidden, gates).t() if i == 1 else normal(gates, hidden)
        states = [normal(batch, hidden), normal(batch, hidden) if cell == "lstm" else None]
        tensors = [*states, w_ih, w_hh, normal(gates), normal(gates)]
        layers.append(Layer(*(None if t is None else t.requires_grad_() for t in tensors)))
    return normal(steps * batch, width).requires_grad_(), layers


def leaves(x: Tensor, layers: list[Layer]) -> list[Tensor]:
    return [x, *(t for layer in layers for t in layer if t is not None)]


def with_gradients(y: Tensor, finals: Any, wanted: list[Tensor], cell: str) -> list[Tensor]:
    results = [y, *(t for pair in finals for t in (pair if cell == "lstm" else pair[:1]))]
    loss = sum((r * torch.linspace(-1, 1, r.numel()).view_as(r)).sum() for r in results)
    return [*results, *torch.autograd.grad(loss, wanted)]


def layer_by_layer(
    x: Tensor, layers: list[Layer], loop: Loop
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    finals = []
    for layer in layers:
        x, h, c = cpu_layer(x, layer, loop)
        finals.append((h, c))
    return x, finals


def equal_for_any_threads(runs: list[list[Tensor]], expected: list[Tensor]) -> None:
    for found in runs:
        for f, first, e in zip(found, runs[0], expected, strict=True):
            assert torch.equal(f, first)
            # Products of 256 rows go to AMX where it is; those of a piece are smaller.
            if lmfast._extension.cpu_isa() == "amx":
                torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(f, e)


@EVERY_CELL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_layer_by_layer_for_any_threads(
    cell: str, shape: tuple[int, ...], cpu_isa: str
) -> None:
    if cpu_isa == "default":
        pytest.skip("no product of this package")
    x, layers = arguments(cell, shape)
    batch = shape[0]
    sizes = torch.arange(shape[1], 0, -1).clamp_max(batch) if batch > 2 else None
    if sizes is not None:
        x = x.detach()[: int(sizes.sum())].requires_grad_()
    loop = Loop(sizes, batch, cell, False)
    wanted, runs, threads = leaves(x, layers), [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            runs.append(with_gradients(*cpu_stack(x, layers, loop), wanted, cell))
    finally:
        torch.set_num_threads(threads)
    found = layer_by_layer(x, layers, loop)
    equal_for_any_threads(runs, with_gradients(*found, wanted, cell))


def plain(cell: str, missing: list[int], asked: slice, exact: bool) -> list[Tensor]:
    """Results and gradients without some operands, of some results; by the formulas in fp64."""
    torch.manual_seed(3)
    x, layers = arguments(cell, (2, 11, 3, 9, 2), torch.float64 if exact else torch.float32)
    layers = [
        Layer(*(None if i in missing else t for i, t in enumerate(layer))) for layer in layers
    ]
    wanted, loop = leaves(x, layers), Loop(None, 2, cell, False)
    if exact:
        flat = [t for layer in layers for t in layer]
        y, *finals = _recurrent_stack._reference(x, *flat, loop=loop)
        pairs = list(zip(finals[:2], finals[2:], strict=True))
    else:
        y, pairs = cpu_stack(x, layers, loop)
    results = [y, *(t for pair in pairs for t in (pair if cell == "lstm" else pair[:1]))][asked]
    loss = sum((r * torch.linspace(-1, 1, r.numel()).view_as(r)).sum() for r in results)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]
    return [*results, *grads]


@EVERY_CELL
@pytest.mark.parametrize("asked", [slice(0, 1), slice(1, 2), slice(-1, None)])
def test_missing_operands_and_gradients(cell: str, asked: slice, needs_cpu_kernels: None) -> None:
    for missing in ([], [0, 1], [4, 5], [5], [4]):
        found, exact = (plain(cell, missing, asked, exact) for exact in (False, True))
        for f, e in zip(found, exact, strict=True):
            # fp32 sums over 11 steps, of numbers of order 1.
            torch.testing.assert_close(f.double(), e, rtol=2e-5, atol=2e-5)


@EVERY_CELL
def test_gradients_of_gradients(cell: str, needs_cpu_kernels: None) -> None:
    found, loop = [], Loop(None, 2, cell, False)
    for exact in (False, True):
        torch.manual_seed(4)
        x, layers = arguments(cell, (2, 6, 3, 5, 2), torch.float64 if exact else torch.float32)
        flat = [t for layer in layers for t in layer]
        if exact:
            y = _recurrent_stack._reference(x, *flat, loop=loop)[0]
        else:
            y = cpu_stack(x, layers, loop)[0]
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        wanted = [layer[k] for layer in layers for k in (2, 3)]
        found.append(torch.autograd.grad(dx.square().sum(), wanted))
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-5)


@EVERY_CELL
def test_opcheck(cell: str, needs_cpu_kernels: None) -> None:
    batch, steps, hidden = 2, 9, 20
    x, layers = arguments(cell, (batch, steps, 6, hidden, 2))
    h0, c0, w_ih, w_hh, b_ih, b_hh = (
        [t.detach() for t in column if t is not None] for column in zip(*layers, strict=True)
    )
    hidden_bias = [b[:hidden].clone() for b in b_hh] if cell == "gru" else []
    index, lstm = CELLS.index(cell), cell == "lstm"
    call = (x.detach(), w_ih, w_hh, b_ih, hidden_bias, h0, c0, None, batch, index, True, [16, 16])
    torch.library.opcheck(_recurrent_stack._forward_op, call)
    results = _recurrent_stack._forward_op(*call)
    y, h, c, gates, cells = (results[k::5] for k in range(5))
    grads = (torch.ones_like(y[1]), h, c if lstm else [])
    rest = (w_ih[1:], w_hh, h0, c0, None, batch, index, 16)
    torch.library.opcheck(_recurrent_stack._backward_op, (*grads, y, gates, cells, *rest))
    with pytest.raises(RuntimeError, match="w_ih must have 2 tensors, got 1"):
        _recurrent_stack._forward_op(call[0], w_ih[:1], *call[2:])
    with pytest.raises(RuntimeError, match="w_ih has a wrong shape"):
        _recurrent_stack._forward_op(call[0], w_ih[::-1], *call[2:])


def test_which_stacks_run_as_one(needs_cpu_kernels: None) -> None:
    def asked(batch: int, hidden: int, count: int = 2, cell: str = "tanh", steps: int = 64) -> bool:
        x, layers = arguments(cell, (batch, steps, 4, hidden, count))
        return runs_as_wavefront(x, layers, Loop(None, batch, cell, False))

    own = lmfast._extension.cpu_isa() != "default"
    assert asked(1, 128) is own
    assert asked(1, 128, cell="lstm") is own
    assert asked(8, 128) is own
    assert not asked(1, 128, count=1)
    assert not asked(1, 128, steps=8)
    assert not asked(16, 128)
    assert not asked(1, 320)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not asked(1, 128)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert not asked(1, 128)


def test_an_upper_layer_decides_too(needs_cpu_kernels: None) -> None:
    """Its tangents are not lost, and its device is looked at."""
    layer = lmfast.nn.RNN(8, 8, num_layers=2)
    x, weight = torch.randn(40, 1, 8), layer.weight_hh_l1.detach()
    tangent = torch.randn_like(weight)

    def run(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight_hh_l1": weight}, (x,))[0]

    _, found = torch.func.jvp(run, (weight,), (tangent,))
    step = 1e-2  # central differences: rounding 1e-5, curvature 1e-4
    around = (run(weight + step * tangent) - run(weight - step * tangent)) / (2 * step)
    assert found.abs().max() > 0.1
    assert (found - around).abs().max() < 3e-3 * found.abs().max()
    for inputs in (x, x[:1]):
        with pytest.raises(RuntimeError, match="device"), torch.no_grad():
            torch.func.functional_call(layer, {"weight_hh_l1": weight.to("meta")}, (inputs,))


def modules(kind: str) -> nn.Module:
    if kind == "ElmanRNN":
        return lmfast.nn.ElmanRNN(24, 3)
    return getattr(lmfast.nn, kind)(24, 24, 3, batch_first=True, dropout=0.5).eval()


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "TextbookGRU", "ElmanRNN"])
def test_layers_give_their_stack_to_it(
    kind: str, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    of_stack = _recurrent_stack._forward_op
    monkeypatch.setattr(
        _recurrent_stack, "_forward_op", lambda *args: calls.append(1) or of_stack(*args)
    )
    layer, x = modules(kind), torch.randn(2, 40, 24)
    run = layer.forward_with_state if kind == "ElmanRNN" else layer
    y, state = run(x)
    assert len(calls) == (lmfast._extension.cpu_isa() != "default")
    with lmfast.use_backend("torch"):
        expected, final = run(x)
    for f, e in zip([y, *state], [expected, *final], strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    calls.clear()
    if kind in ("RNN", "LSTM", "GRU"):
        packed = pack_padded_sequence(x, torch.tensor([40, 33]), batch_first=True)
        alone = run(x[1:, :33])[0]
        calls.clear()
        rows = nn.utils.rnn.pad_packed_sequence(run(packed)[0], batch_first=True)[0]
        torch.testing.assert_close(rows[1:, :33], alone, rtol=1e-4, atol=1e-5)
        assert len(calls) == (lmfast._extension.cpu_isa() != "default")
        calls.clear()
    if kind != "ElmanRNN":
        layer.train()(x)  # dropout lies between the layers
        assert not calls
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
    found = compiled(x)
    torch.testing.assert_close(found if kind == "ElmanRNN" else found[0], y, rtol=0, atol=0)
