"""Cells, the textbook's GRU, and weights between textbook, these layers and torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import fill
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import lmfast

CELLS = pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
SOURCE = torch.tensor(
    [[0.1, 0.2, 0.6], [0.2, 0.1, 0.4], [0.1, 0.3, 0.3], [0, 0.7, 0.1], [0.5, 0.2, 0.7], [0, 0, 0]],
    dtype=torch.float64,
)
LSTM_WEIGHTS = {f"W_{g}": fill(10 + n, (2, 5)) for n, g in enumerate("fico")}
LSTM_WEIGHTS |= {f"b_{g}": torch.full((2,), float(g == "f")).double() for g in "fico"}
GRU_WEIGHTS = {f"W_{g}": fill(20 + n, (2, 5)) for n, g in enumerate("rzh")}
GRU_WEIGHTS |= {f"b_{g}": fill(23 + n, (2,)) for n, g in enumerate("rzh")}
LSTM_ROWS = [
    [0.061572752, -0.039802268], [0.086663883, -0.059719979], [0.106910736, -0.076499991],
    [0.134789491, -0.097928336], [0.180725911, -0.128055997], [0.116748143, -0.089740621],
]  # fmt: skip
GRU_ROWS = [
    [-0.066587169, 0.115596949], [-0.107837843, 0.180397822], [-0.139372113, 0.219325634],
    [-0.178780761, 0.263239331], [-0.228505085, 0.311613074], [-0.159090162, 0.249827177],
]  # fmt: skip


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@CELLS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_are_torchs(name: str, bias: bool, dtype: torch.dtype) -> None:
    theirs, ours = getattr(nn, name)(5, 7, bias), getattr(lmfast.nn, name)(5, 7, bias)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x, h, c = (torch.randn(3, n, dtype=dtype) for n in (5, 7, 7))
    state = (h, c) if name == "LSTMCell" else h
    single = tuple(s[0] for s in state) if name == "LSTMCell" else h[0]
    for inputs in ((x, state), (x,), (x[0], single), (x[0],)):
        found, expected = as_tuple(ours(*inputs)), as_tuple(theirs(*inputs))
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # another way: the step in one operator call
        for f, e in zip(as_tuple(ours(x, state)), as_tuple(theirs(x, state)), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)
        for f, e in zip(as_tuple(ours(x[0], single)), as_tuple(theirs(x[0], single)), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)
    grads = []
    for cell in (ours, theirs):
        leaves = [x.clone().requires_grad_(), h.clone().requires_grad_(), *cell.parameters()]
        given = (leaves[1], c) if name == "LSTMCell" else leaves[1]
        loss = sum((t * torch.linspace(-1, 1, 7)).sum() for t in as_tuple(cell(leaves[0], given)))
        grads.append(torch.autograd.grad(loss, leaves))
    for f, e in zip(*grads, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)


def test_relu_cell() -> None:
    theirs, ours = (
        nn.RNNCell(5, 7, nonlinearity="relu"),
        lmfast.nn.RNNCell(5, 7, nonlinearity="relu"),
    )
    ours.load_state_dict(theirs.state_dict())
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, h), theirs(x, h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_a_step_without_gradients_is_one_operator_call(
    name: str, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the comparisons with torch.nn would compare it with itself."""
    ours = getattr(lmfast.nn, name)(5, 7)

    def refuse(*args: Any) -> None:
        raise AssertionError("left to torch.nn")

    monkeypatch.setattr(getattr(nn, name), "forward", refuse)
    with torch.no_grad():
        ours(torch.randn(1, 5))
        ours(torch.randn(5))
    with pytest.raises(AssertionError, match="left to"):
        ours(torch.randn(1, 5))


def test_textbook_cell_takes_the_same_step_without_gradients() -> None:
    cell = lmfast.nn.GRUCell(5, 7, reset_after=False)
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    with torch.no_grad():
        found, alone = cell(x, h), cell(x[0], h[0])
    torch.testing.assert_close(found, cell(x, h).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, found[0], rtol=1e-5, atol=1e-6)


@CELLS
def test_what_torch_rejects_is_rejected_with_its_words(name: str) -> None:
    theirs, ours = getattr(nn, name)(5, 7), getattr(lmfast.nn, name)(5, 7)
    state = torch.zeros(3, 7)
    pack = (lambda s: (s, s)) if name == "LSTMCell" else (lambda s: s)
    for wrong in (
        (torch.zeros(2, 3, 5),),
        (torch.zeros(3, 4),),
        (torch.zeros(2, 5), pack(state)),
        (torch.zeros(3, 5), pack(torch.zeros(3, 6))),
        (torch.zeros(3, 5), pack(torch.zeros(1, 3, 7))),
        (torch.zeros(3, 5).double(), pack(state)),
    ):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(*wrong)
        with pytest.raises(expected.type) as found, torch.no_grad():
            ours(*wrong)
        assert str(found.value) == str(expected.value)


def test_golden_lstm_from_the_textbooks_matrices() -> None:
    state = lmfast.nn.lstm_from_textbook(LSTM_WEIGHTS)
    for module in (nn.LSTM, lmfast.nn.LSTM):
        lstm = module(3, 2, batch_first=True).double()
        lstm.load_state_dict(state)
        y, (_, c) = lstm(SOURCE[None])
        torch.testing.assert_close(
            y[0], torch.tensor(LSTM_ROWS, dtype=torch.float64), rtol=0, atol=1e-9
        )
        final = torch.tensor([0.239378322, -0.18147385], dtype=torch.float64)
        torch.testing.assert_close(c[0, 0], final, rtol=0, atol=1e-9)
    cell = lmfast.nn.LSTMCell(3, 2).double()
    cell.load_state_dict(lmfast.nn.lstm_from_textbook(LSTM_WEIGHTS, ""))
    hx = None
    for x, expected in zip(SOURCE, LSTM_ROWS):
        hx = cell(x, hx)
        torch.testing.assert_close(
            hx[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
        )
    back = lmfast.nn.lstm_to_textbook(state)
    assert all(torch.equal(back[name], w) for name, w in LSTM_WEIGHTS.items())


def test_golden_gru_of_the_textbook() -> None:
    state = lmfast.nn.gru_from_textbook(GRU_WEIGHTS)
    gru = lmfast.nn.TextbookGRU(3, 2, batch_first=True).double()
    gru.load_state_dict(state)
    rows = torch.tensor(GRU_ROWS, dtype=torch.float64)
    torch.testing.assert_close(gru(SOURCE[None])[0][0], rows, rtol=0, atol=1e-9)
    cell = lmfast.nn.GRUCell(3, 2, reset_after=False).double()
    cell.load_state_dict(lmfast.nn.gru_from_textbook(GRU_WEIGHTS, ""))
    h = None
    for x, expected in zip(SOURCE, rows):
        h = cell(x, h)
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-9)
    back = lmfast.nn.gru_to_textbook(state)
    assert all(torch.equal(back[name], w) for name, w in GRU_WEIGHTS.items())
    with pytest.raises(ValueError, match="must have W_h"):
        lmfast.nn.gru_from_textbook({k: v for k, v in GRU_WEIGHTS.items() if k != "W_h"})


def test_textbook_gru_in_every_form_of_call() -> None:
    """Packed equals row by row, forwards and backwards, over two layers; the forms agree."""
    gru = lmfast.nn.TextbookGRU(3, 4, 2, bidirectional=True).double()
    rows = [torch.randn(n, 3).double() for n in (2, 5, 1, 5)]
    packed, h_n = gru(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    assert lengths.tolist() == [2, 5, 1, 5]
    for i, row in enumerate(rows):
        y, h = gru(row)
        torch.testing.assert_close(padded[i, : len(row)], y)
        torch.testing.assert_close(h_n[:, i], h)
        torch.testing.assert_close(gru(row[:, None])[0][:, 0], y)
    # Layer 0, backwards, is the cell from the last step to the first.
    cell = lmfast.nn.GRUCell(3, 4, reset_after=False).double()
    suffix = "_l0_reverse"
    names = [n for n, _ in cell.named_parameters()]
    cell.load_state_dict({n: gru.state_dict()[n + suffix] for n in names})
    h = None
    for x in reversed(rows[1]):
        h = cell(x, h)
    torch.testing.assert_close(h_n[1, 1], h)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        gru(torch.zeros(2, 3, 3).double(), torch.zeros(1, 3, 4).double())


def test_elman_to_torch_and_back() -> None:
    ours, theirs = lmfast.nn.ElmanRNN(4, 2), nn.RNN(4, 4, 2, batch_first=True)
    theirs.load_state_dict(lmfast.nn.elman_to_torch(ours))
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=1e-5, atol=1e-6)
    nn.init.normal_(theirs.bias_hh_l0)
    ours.load_state_dict(lmfast.nn.elman_from_torch(theirs.state_dict()))
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="input_size must be hidden_size"):
        lmfast.nn.elman_from_torch(nn.RNN(3, 4).state_dict())
