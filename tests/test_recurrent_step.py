"""One time step in one operator: the same numbers as the loop over sequences, for every cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfast
import lmfast.nn
from lmfast import ops
from lmfast.ops import _recurrent_step
from lmfast.ops._recurrent_reference import CELLS, GATES, Layer, Loop, reference_layer

# Sums of at most 70 float products of order 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def arguments(cell: str, batch: int, width: int, hidden: int) -> list[Tensor]:
    """x, h, c, w_ih, w_hh, b_ih, b_hh"""
    rows = GATES[cell] * hidden
    shapes = [(batch, width), (batch, hidden), (batch, hidden), (rows, width), (rows, hidden)]
    return [torch.randn(s) * hidden**-0.5 for s in [*shapes, (rows,), (rows,)]]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 67), (3, 16, 48), (2, 5, 300)])
def test_step_is_the_reference(cell: str, shape: tuple[int, int, int], cpu_isa: str) -> None:
    x, h, c, *weights = arguments(cell, *shape)
    index, lstm = CELLS.index(cell), cell == "lstm"
    for state, biases in ((True, 2), (False, 2), (True, 1), (True, 0)):
        h0, c0 = (h, c if lstm else None) if state else (None, None)
        given = weights[: 2 + biases]
        padded = [*given, *[None] * (2 - biases)]
        expected = reference_layer(x, Layer(h0, c0, *padded), Loop(None, len(x), cell, False))
        for right in (False, True):
            ordered = [w.t().contiguous() if right else w for w in given[:2]] + given[2:]
            states = (None if s is None else s[None] for s in (h0, c0))
            y, h_n, c_n = _recurrent_step.step_op(x, *states, ordered, 1, index, right)
            torch.testing.assert_close(y, expected[0], **CLOSE)
            assert torch.equal(h_n[0], y)
            if lstm:
                torch.testing.assert_close(c_n[0], expected[2], **CLOSE)


def test_opcheck_and_bad_calls(needs_cpu_kernels: None) -> None:
    x, h, c, *weights = arguments("lstm", 2, 3, 5)
    call = (x, h[None], c[None], weights, 1, CELLS.index("lstm"), False)
    torch.library.opcheck(_recurrent_step.step_op, call)
    for index, wrong in ((0, x.double()), (1, h), (3, weights[:1]), (4, 3), (5, 9), (6, True)):
        with pytest.raises(RuntimeError, match="lmfast: "):
            _recurrent_step.step_op(*(wrong if i == index else a for i, a in enumerate(call)))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mode", ["RNN", "LSTM", "GRU"])
def test_layers_take_the_step_when_nothing_is_recorded(
    mode: str, layers: int, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = (
        getattr(library, mode)(5, 7, layers, dropout=0.5 if layers > 1 else 0.0)
        for library in (nn, lmfast.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    ours.eval(), theirs.eval()
    calls = []
    step = _recurrent_step.step_op

    def recorded(*args: Any) -> Any:
        result = step(*args)
        calls.append(1)
        return result

    monkeypatch.setattr(lmfast.nn.rnn, "step_op", recorded)

    def check(x: Tensor, hx: Any, stepped: bool) -> None:
        calls.clear()
        for f, e in zip(
            *(torch.utils._pytree.tree_leaves(m(x, hx)) for m in (ours, theirs)), strict=True
        ):
            torch.testing.assert_close(f, e, **CLOSE)
        assert bool(calls) == stepped

    states = [torch.randn(layers, 3, 7) for _ in range(2)]
    hx = tuple(states) if mode == "LSTM" else states[0]
    x = torch.randn(1, 3, 5)
    check(x, hx, False)
    with torch.no_grad():
        check(x, hx, True)
        check(x, None, True)
        check(torch.randn(2, 3, 5), hx, False)
        check(x[:, :, [4, 0, 2, 1, 3]].transpose(1, 2).contiguous().transpose(1, 2), hx, False)
        with lmfast.use_backend("torch"):
            check(x, hx, False)
        for wrong in (states[0][:, :2], states[0].double(), "state"):
            with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError)):
                ours(x, (wrong, wrong) if mode == "LSTM" else wrong)


@pytest.mark.parametrize("op", ["elman_rnn", "lstm", "gru"])
def test_strided_weights(op: str, needs_cpu_kernels: None) -> None:
    cell = {"elman_rnn": "tanh"}.get(op, op)
    x, h, c, *weights = arguments(cell, 2, 6, 20)
    wide = [torch.randn(2 * w.shape[0], *[2 * n for n in w.shape[1:]]) for w in weights]
    strided = [t[::2, ::2] if t.dim() == 2 else t[::2] for t in wide]
    for s, w in zip(strided, weights, strict=True):
        s.copy_(w)
    state = (h, c) if op == "lstm" else h
    run = getattr(ops, op)
    with torch.no_grad():
        found = run(x[:, None], state, strided, backend="cpu")
        expected = run(x[:, None], state, weights, backend="torch")
    for f, e in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize("op", ["elman_rnn", "lstm", "gru"])
@torch.no_grad()
def test_operators_on_one_step(op: str, needs_cpu_kernels: None) -> None:
    cell = {"elman_rnn": "tanh"}.get(op, op)
    run = getattr(ops, op)
    for batch, width in ((1, 6), (3, 0), (0, 6), (17, 6)):
        x, h, c, *weights = arguments(cell, batch, width, 20)
        for given in (weights, weights[:2], [*weights[:2], None, weights[3]]):
            for state in ((h, c) if op == "lstm" else h, None):
                calls = (run(x[:, None], state, given, backend=b) for b in ("cpu", "torch"))
                found, expected = (torch.utils._pytree.tree_leaves(r) for r in calls)
                for f, e in zip(found, expected, strict=True):
                    assert f.shape == e.shape
                    torch.testing.assert_close(f, e, **CLOSE)


def test_elman_stack_steps(needs_cpu_kernels: None) -> None:
    rnn = lmfast.nn.ElmanRNN(19, 3)
    x, h0 = torch.randn(2, 1, 19), torch.randn(3, 2, 19)
    y, state = rnn.forward_with_state(x, h0)
    with torch.no_grad():
        found, found_state = rnn.forward_with_state(x, h0)
    assert not found.requires_grad
    torch.testing.assert_close(found, y, **CLOSE)
    torch.testing.assert_close(found_state, state, **CLOSE)
