"""elman_rnn, lstm and gru: the textbook's numbers, torch.nn's, chunks, lengths, edges."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lmfast
from lmfast import ops
from lmfast.ops import _recurrent
from lmfast.ops._recurrent_reference import CELLS, GATES, Layer, Loop

OPS = {
    "elman_rnn": (ops.elman_rnn, 1),
    "lstm": (ops.lstm, 4),
    "gru": (ops.gru, 3),
    "textbook gru": (partial(ops.gru, reset_after=False), 3),
}
EVERY_CELL = pytest.mark.parametrize("cell", list(OPS))
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])

# Float against float, sums of at most 70 terms of order 1 and a dozen steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def fill(n: int, *shape: int) -> Tensor:
    """0.3 sin(0.7 i + n) over the elements i."""
    count = torch.Size(shape).numel()
    return (0.3 * torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + n)).reshape(shape)


X = torch.tensor(
    [[0.1, 0.2, 0.6], [0.2, 0.1, 0.4], [0.1, 0.3, 0.3], [0, 0.7, 0.1], [0.5, 0.2, 0.7], [0, 0, 0]],
    dtype=torch.float64,
)[None]


def numbers(text: str, *shape: int) -> Tensor:
    return torch.tensor([float(n) for n in text.split()], dtype=torch.float64).reshape(shape)


def random_call(
    cell: str, batch: int, steps: int, width: int, hidden: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    gates = OPS[cell][1]

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * hidden**-0.5).to(dtype).requires_grad_()

    weights = (
        normal(gates * hidden, width),
        normal(gates * hidden, hidden),
        normal(gates * hidden),
        normal(gates * hidden),
    )
    h, c = normal(batch, hidden), normal(batch, hidden)
    return normal(batch, steps, width), (h, c) if cell == "lstm" else h, weights


def flat(result: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(result))


def with_backend(backend: str) -> torch.dtype:
    """The widest dtype of the backend; skips where there is none."""
    if backend == "torch":
        return torch.float64
    if lmfast._extension.cpu_isa() is None:
        pytest.skip("no CPU kernels")
    return torch.float32


def tolerance(dtype: torch.dtype) -> float:
    """The printed digits for float64; a few roundings of numbers below 1 for float32."""
    return 1e-9 if dtype == torch.float64 else 3e-7


@BACKENDS
def test_elman_stack_gives_the_textbooks_numbers(backend: str) -> None:
    dtype = with_backend(backend)

    def layer(x: Tensor, wh: Tensor, uh: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        weights = tuple(w.to(dtype) for w in (wh.t(), uh.t(), b))
        return ops.elman_rnn(x.to(dtype), None, weights, backend=backend)

    y, first = layer(X, fill(1, 3, 3), fill(2, 3, 3), fill(3, 3))
    y, _ = layer(y, fill(4, 3, 3), fill(5, 3, 3), fill(6, 3))
    expected = numbers(
        "-.124337478 .074656032 .23492637 -.084790309 .063955542 .180945379 -.130243666 "
        ".032940698 .179431119 -.171459465 -.017074265 .145998357 -.116927972 .040306185 "
        ".177261995 -.1368125 .024785322 .173814478",
        *(1, 6, 3),
    )
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance(dtype))
    state = numbers(".101926371 -.157164989 -.331670188", 1, 3)
    torch.testing.assert_close(first.double(), state, rtol=0, atol=tolerance(dtype))

    half, none = 0.5 * torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    y, _ = layer(layer(X, half, half, none)[0], half, half, none)
    expected = numbers(
        ".024974 .049793 .144635 .170874 .278305 .314014 .151588 .210583 .255208", 3, 3
    )
    torch.testing.assert_close(y[0, [0, 4, 5]].double(), expected, rtol=0, atol=1e-6)


@BACKENDS
def test_lstm_gives_the_textbooks_numbers(backend: str) -> None:
    dtype = with_backend(backend)
    f, i, c, o = (fill(n, 2, 5) for n in (10, 11, 12, 13))
    rows = torch.cat((i, f, c, o)).to(dtype)
    bias = torch.zeros(8, dtype=dtype)
    bias[2:4] = 1
    weights = (rows[:, 2:], rows[:, :2], bias, torch.zeros_like(bias))
    y, (h, c_n) = ops.lstm(X.to(dtype), None, weights, backend=backend)
    expected = numbers(
        ".061572752 -.039802268 .086663883 -.059719979 .106910736 -.076499991 .134789491 "
        "-.097928336 .180725911 -.128055997 .116748143 -.089740621",
        *(1, 6, 2),
    )
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance(dtype))
    cells = numbers(".239378322 -.18147385", 1, 2)
    torch.testing.assert_close(c_n.double(), cells, rtol=0, atol=tolerance(dtype))
    assert torch.equal(h, y[:, -1])


@BACKENDS
def test_gru_that_resets_first_gives_the_textbooks_numbers(backend: str) -> None:
    dtype = with_backend(backend)
    r, z, n = (fill(k, 2, 5) for k in (20, 21, 22))
    rows = torch.cat((r, z, n)).to(dtype)
    bias = torch.cat([fill(k, 2) for k in (23, 24, 25)]).to(dtype)
    weights = (rows[:, 2:], rows[:, :2], bias, torch.zeros_like(bias))
    y, _ = ops.gru(X.to(dtype), None, weights, reset_after=False, backend=backend)
    expected = numbers(
        "-.066587169 .115596949 -.107837843 .180397822 -.139372113 .219325634 -.178780761 "
        ".263239331 -.228505085 .311613074 -.159090162 .249827177",
        *(1, 6, 2),
    )
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance(dtype))


@pytest.mark.parametrize("mode", ["tanh", "relu", "lstm", "gru"])
def test_the_reference_is_torchs_own_layer(mode: str) -> None:
    cell = mode if mode in OPS else "elman_rnn"
    x, state, weights = random_call(cell, 3, 7, 5, 6, torch.float64)
    flags = (True, 1, 0.0, False, False, True)
    given = [s[None] for s in flat(state)]
    if mode == "lstm":
        expected = torch.lstm(x, given, list(weights), *flags)
    else:
        whole = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu, "gru": torch.gru}[mode]
        expected = whole(x, given[0], list(weights), *flags)
    options = {"nonlinearity": mode} if cell == "elman_rnn" else {}
    found = flat(OPS[cell][0](x, state, weights, backend="torch", **options))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e.reshape(f.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", [*OPS, "relu"])
def test_gradcheck_twice(cell: str, reverse: bool) -> None:
    name = {"relu": "elman_rnn"}.get(cell, cell)
    options = {"relu": {"nonlinearity": "relu"}}
    x, state, weights = random_call(name, 2, 2, 1, 2, torch.float64)
    states = flat(state)

    def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = tensors[: len(states)] if name == "lstm" else tensors[0]
        lengths = torch.tensor([1, 2])
        return tuple(
            flat(
                OPS[name][0](
                    *(x, given, tensors[len(states) :]),
                    lengths=lengths,
                    reverse=reverse,
                    **options.get(cell, {}),
                )
            )
        )

    assert torch.autograd.gradcheck(function, (x, *states, *weights))
    assert torch.autograd.gradgradcheck(function, (x, *states, *weights))


@EVERY_CELL
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 9, 4, 70), (40, 4, 3, 20)])
def test_gradients_of_gradients_agree_with_the_reference(
    cell: str, shape: tuple[int, ...], needs_cpu_kernels: None
) -> None:
    x, state, weights = random_call(cell, *shape)
    found = []
    for backend in ("cpu", "torch"):
        y = flat(OPS[cell][0](x, state, weights, backend=backend))[0]
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), weights))
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-4)


@EVERY_CELL
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_few_sequences_over_all_threads(cell: str, batch: int, cpu_isa: str) -> None:
    x, state, weights = random_call(cell, batch, 6, 8, 300)
    found = []
    for backend in ("cpu", "torch"):
        results = flat(OPS[cell][0](x, state, weights, backend=backend))
        leaves = (x, *flat(state), *weights)
        found.append([*results, *torch.autograd.grad(sum(r.sum() for r in results), leaves)])
    for f, e in zip(*found, strict=True):
        # Sums of up to 1,200 float products of size 1, in another order: about 35 roundings of 6e-8
        # to a side, and a few times that for the largest of some thousands.
        torch.testing.assert_close(f, e, rtol=1e-4, atol=2e-5)


@EVERY_CELL
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 13, 3, 67), (5, 13, 3, 67), (40, 13, 3, 40)])
def test_chunks_with_carried_state_equal_one_call(
    cell: str, shape: tuple[int, ...], needs_cpu_kernels: None
) -> None:
    x, state, weights = random_call(cell, *shape)
    op = OPS[cell][0]
    with torch.no_grad():
        whole, final = op(x, state, weights, backend="cpu")
        parts = []
        for piece in (x[:, :0], x[:, :1], x[:, 1:6], x[:, 6:]):
            y, state = op(piece, state, weights, backend="cpu")
            parts.append(y)
    # The step of one element is another kernel, with sums in another order.
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-6)
    for a, b in zip(flat(state), flat(final), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@EVERY_CELL
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_give_each_row_what_it_gets_alone(
    cell: str, reverse: bool, needs_cpu_kernels: None
) -> None:
    x, state, weights = random_call(cell, 6, 5, 3, 19)
    lengths = torch.tensor([3, 5, 0, 1, 5, 2])
    op = OPS[cell][0]
    y, final = op(x, state, weights, lengths=lengths, reverse=reverse, backend="cpu")
    changed = torch.where(torch.arange(5)[:, None] < lengths[:, None, None], x, torch.nan)
    again = op(changed, state, weights, lengths=lengths, reverse=reverse, backend="cpu")
    assert torch.equal(again[0], y), "padding was read"
    for row, length in enumerate(lengths.tolist()):
        alone = [s[row : row + 1] for s in flat(state)]
        given = tuple(alone) if cell == "lstm" else alone[0]
        piece = x[row : row + 1, :length]
        y_row, final_row = op(piece, given, weights, reverse=reverse, backend="cpu")
        torch.testing.assert_close(y[row, :length], y_row[0], **CLOSE)
        assert not y[row, length:].any()
        for a, b in zip(flat(final), flat(final_row), strict=True):
            torch.testing.assert_close(a[row], b[0], **CLOSE)


@EVERY_CELL
def test_saturation_and_nan(cell: str, cpu_isa: str) -> None:
    x, _, weights = random_call(cell, 3, 4, 2, 17)
    with torch.no_grad():
        huge = x * 1e4
        found = flat(OPS[cell][0](huge, None, weights, backend="cpu"))
        exact = flat(
            OPS[cell][0](huge.double(), None, [w.double() for w in weights], backend="torch")
        )
        for f, e in zip(found, exact, strict=True):
            # Saturated gates are 0 or 1 to the last bit; the others see inputs rounded at 1e4.
            torch.testing.assert_close(f.double(), e, rtol=0, atol=2e-3)
        x[1, 2, 0] = torch.nan
        y = OPS[cell][0](x, None, weights, backend="cpu")[0]
    assert y[1, 2:].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert y[1, :2].isfinite().all()


@EVERY_CELL
def test_a_row_does_not_depend_on_its_batch(cell: str, needs_cpu_kernels: None) -> None:
    x, state, weights = random_call(cell, 50, 6, 3, 40)
    op = OPS[cell][0]
    states = flat(state)
    with torch.no_grad():
        y, _ = op(x, state, weights, backend="cpu")
        for batch in (3, 7, 33):
            given = [s[:batch] for s in states]
            few, _ = op(
                x[:batch], tuple(given) if cell == "lstm" else given[0], weights, backend="cpu"
            )
            if lmfast._extension.cpu_isa() == "default":  # PyTorch's product of the inputs
                torch.testing.assert_close(few, y[:batch], rtol=0, atol=1e-6)
            else:
                assert torch.equal(few, y[:batch])


@EVERY_CELL
def test_long_sequences_stay_within_the_error_of_pytorch(
    cell: str, needs_cpu_kernels: None
) -> None:
    x, state, weights = random_call(cell, 2, 1024, 4, 24)
    exact = OPS[cell][0](
        x.double(),
        torch.utils._pytree.tree_map(lambda s: s.double(), state),
        [w.double() for w in weights],
    )[0]
    error, plain = (
        (OPS[cell][0](x, state, weights, backend=b)[0] - exact).norm() for b in ("cpu", "torch")
    )
    assert error <= 1.5 * plain + 1e-7 * exact.norm()


@EVERY_CELL
def test_meta_tensors_and_autocast(cell: str) -> None:
    x, state, weights = random_call(cell, 2, 3, 4, 5)
    op, expected = OPS[cell][0], flat(OPS[cell][0](x, state, weights))
    meta = torch.utils._pytree.tree_map(lambda t: t.to("meta"), (x, state, weights))
    assert [t.shape for t in flat(op(*meta))] == [t.shape for t in expected]
    with torch.autocast("cpu", torch.bfloat16):
        found = flat(op(x.bfloat16(), state, weights))
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float32
        # x rounded to bf16, 2^-9 of numbers below 2.
        torch.testing.assert_close(f, e, rtol=0, atol=1e-2)


def test_errors_name_the_argument() -> None:
    x, state, (w_ih, w_hh, b_ih, b_hh) = random_call("lstm", 2, 3, 4, 5)
    good = (w_ih, w_hh, b_ih, b_hh)
    with pytest.raises(ValueError, match=r"x must have 3 dimensions"):
        ops.lstm(x[0], state, good)
    with pytest.raises(TypeError, match="weights must be a tuple"):
        ops.lstm(x, state, good[:1])
    with pytest.raises(ValueError, match=r"w_ih must have shape \(20, 4\)"):
        ops.lstm(x, state, (w_ih[:, :3], *good[1:]))
    with pytest.raises(ValueError, match=r"b_hh must have shape \(20,\)"):
        ops.lstm(x, state, (*good[:3], b_hh[1:]))
    with pytest.raises(TypeError, match="state must be a tuple"):
        ops.lstm(x, state[0], good)
    with pytest.raises(ValueError, match=r"the cell state must have shape \(2, 5\)"):
        ops.lstm(x, (state[0], state[1][:, :4]), good)
    with pytest.raises(TypeError, match="w_hh must have x's dtype"):
        ops.lstm(x, state, (w_ih, w_hh.double(), b_ih, b_hh))
    with pytest.raises(TypeError, match="lengths must be an integer tensor"):
        ops.lstm(x, state, good, lengths=torch.ones(2))
    with pytest.raises(ValueError, match="lengths must be between 0 and T = 3"):
        ops.lstm(x, state, good, lengths=torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="nonlinearity must be"):
        ops.elman_rnn(x, None, (w_ih[:5], w_hh[:5]), nonlinearity="gelu")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_products_in_pieces_of_the_steps_change_nothing(
    cell: str, reverse: bool, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, hidden, gates = 5, 20, GATES[cell] * 20
    sizes = torch.tensor([5, 5, 5, 4, 4, 2, 1, 1, 1])
    for packed, stated in itertools.product((False, True), repeat=2):
        states = [torch.randn(batch, hidden) if stated else None for _ in range(2)]
        weights = [torch.randn(s) / 4 for s in ((gates, 7), (gates, hidden), (gates,), (gates,))]
        layer = Layer(states[0], states[1] if cell == "lstm" else None, *weights)
        x = torch.randn(int(sizes.sum()) if packed else 9 * batch, 7)
        loop = Loop(sizes if packed else None, batch, cell, reverse)
        whole = _recurrent.cpu_layer(x, layer, loop)
        with monkeypatch.context() as patched:
            patched.setattr(_recurrent, "_MOST_PRODUCTS", 2 * 4 * gates * batch)  # two steps each
            found = _recurrent.cpu_layer(x, layer, loop)
        for f, e in zip(found, whole, strict=True):
            # One or two rows, as at the end of a pack, add in several chains.
            if packed or lmfast._extension.cpu_isa() == "default":
                torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(f, e)
