"""The recurrent loops in bf16 (AMX, AVX512-BF16): bf16 calls, fp32 ones at precision "medium"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import lmfast
from lmfast import ops
from lmfast.ops import _recurrent_bf16
from lmfast.ops._recurrent_batch import peer

CELLS = {
    "tanh": (ops.elman_rnn, 1, {}),
    "relu": (ops.elman_rnn, 1, {"nonlinearity": "relu"}),
    "lstm": (ops.lstm, 4, {}),
    "gru": (ops.gru, 3, {}),
}
EVERY_CELL = pytest.mark.parametrize("cell", list(CELLS))
# (B, T, D, H): rows that fill tiles, one row more, and both tiles ragged.
SHAPES = pytest.mark.parametrize("shape", [(32, 5, 33, 64), (17, 7, 8, 32), (41, 4, 20, 96)])


@pytest.fixture(autouse=True)
def needs_tiles() -> None:
    if not lmfast._extension.has_bf16_tiles():
        pytest.skip("neither AMX nor AVX512-BF16 here")


@contextmanager
def precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def arguments(cell: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, h, w_ih, w_hh, b_ih, b_hh, and for an LSTM c behind them."""
    (batch, steps, width, hidden), rows = shape, CELLS[cell][1] * shape[3]
    shapes = [(batch, steps, width), (batch, hidden), (rows, width), (rows, hidden), (rows,)]
    shapes += [(rows,), *([(batch, hidden)] if cell == "lstm" else [])]
    scale = hidden**-0.5
    return [(torch.randn(s) * (scale if i > 1 else 1)).to(dtype) for i, s in enumerate(shapes)]


def call(cell: str, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    op, _, fixed = CELLS[cell]
    x, h, weights = tensors[0], tensors[1], tensors[2:6]
    state = (h, tensors[6]) if cell == "lstm" else h
    return torch.utils._pytree.tree_leaves(op(x, state, weights, **fixed, **options))


def call_peer(cell: str, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """A loop of PyTorch's operators in the dtype of the tensors."""
    x, h, *weights = tensors
    c = weights.pop() if cell == "lstm" else None
    lengths, reverse = options.get("lengths"), options.get("reverse", False)
    return torch.utils._pytree.tree_leaves(peer(x, h, c, *weights, lengths, cell, reverse))


def with_gradients(function: Any, cell: str, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(cell, leaves, **options)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, leaves, given)]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@SHAPES
@EVERY_CELL
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "lengths"])
def test_bf16_is_as_exact_as_pytorch(cell: str, shape: tuple[int, ...], ragged: bool) -> None:
    tensors = arguments(cell, shape, torch.bfloat16)
    options: dict[str, Any] = {"reverse": ragged}
    if ragged:
        options["lengths"] = torch.arange(shape[0]) % (shape[1] + 1)
    found = with_gradients(call, cell, tensors, backend="cpu", **options)
    plain = with_gradients(call_peer, cell, tensors, **options)
    wide = [t.double() for t in tensors]
    exact = with_gradients(call, cell, wide, backend="torch", **options)
    for i, (f, p, e) in enumerate(zip(found, plain, exact, strict=True)):
        assert f.dtype == torch.bfloat16
        if cell == "relu" and i > 1:
            # A sum rounded by 2^-8 changes sign in one unit of 200, and the unit's gradient with
            # it: sqrt(1 / 200) of the whole, in PyTorch as here.
            assert relative(f, e) <= 0.12
        else:
            assert relative(f, e) <= 1.5 * relative(p, e) + 2**-9, i


@EVERY_CELL
def test_medium_precision_is_a_bf16_products(cell: str) -> None:
    shape = (40, 6, 24, 64)
    tensors = arguments(cell, shape, torch.float32)
    exact = with_gradients(call, cell, [t.double() for t in tensors], backend="torch")
    narrow = [t.bfloat16() for t in tensors]
    rounded = with_gradients(call_peer, cell, narrow)
    full = with_gradients(call, cell, tensors)
    with precision("medium"):
        found = with_gradients(call, cell, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(call, cell, tensors)
    for i, (f, c, w, r, e) in enumerate(zip(found, cast, full, rounded, exact, strict=True)):
        assert f.dtype == c.dtype == torch.float32
        assert torch.equal(f, c)
        assert relative(w, e) < 1e-5 < relative(f, e)
        assert relative(f, e) <= (0.12 if cell == "relu" and i > 1 else 1.2 * relative(r, e))


@EVERY_CELL
def test_threads_and_batches_do_not_change_a_row(cell: str) -> None:
    # By rows, by units, and by units of whole panels.
    threads = torch.get_num_threads()
    for shape in ((70, 3, 8, 64), (33, 3, 8, 320)):
        tensors = arguments(cell, shape, torch.bfloat16)
        try:
            runs = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                runs.append(with_gradients(call, cell, tensors))
        finally:
            torch.set_num_threads(threads)
        # PyTorch's products over all steps may sum by thread in bf16; outputs come before them.
        states = 3 if cell == "lstm" else 2
        for other in runs[1:]:
            for i, (a, b) in enumerate(zip(runs[0], other, strict=True)):
                atol = 0 if i < states else float(a.abs().max()) * 2**-7
                torch.testing.assert_close(a, b, rtol=0, atol=atol)
        x, h, *rest = tensors
        if cell == "lstm":
            rest = [*rest[:-1], rest[-1][:19]]
        few = call(cell, [x[:19], h[:19], *rest])
        # Only the product of the inputs, PyTorch's, may sum in another order.
        torch.testing.assert_close(few[0], runs[0][0][:19], rtol=2e-2, atol=1e-2)


@EVERY_CELL
def test_saturation_and_nan(cell: str) -> None:
    tensors = arguments(cell, (20, 4, 8, 32), torch.bfloat16)
    y = call(cell, [tensors[0] * 1e4, tensors[1].clamp(-1, 1), *tensors[2:]])[0]
    assert y.isfinite().all()
    assert cell == "relu" or y.abs().max() <= 1
    tensors[0][1, 2, 0] = torch.nan
    y = call(cell, tensors)[0]
    assert y[1, 2:].isnan().all()
    assert y[torch.arange(20) != 1].isfinite().all()
    assert y[1, :2].isfinite().all()


@EVERY_CELL
def test_gradients_of_gradients(cell: str) -> None:
    tensors = arguments(cell, (16, 3, 4, 32), torch.float32)

    def second() -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = call(cell, leaves)[0]
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves[2:6])

    expected = second()
    with precision("medium"):
        found = second()
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 0.1 * e.norm()


def test_which_calls_run_in_bf16() -> None:
    x, _, *weights = arguments("gru", (16, 3, 4, 32), torch.float32)
    rows = x.flatten(0, 1)

    def asks(x: Tensor = rows, w: Tensor = weights[1], batch: int = 16, cell: str = "gru") -> bool:
        return _recurrent_bf16.runs_in_bf16(x, w, batch, cell)

    assert not asks()
    assert asks(rows.bfloat16())
    assert not asks(rows.half())
    with precision("medium"):
        assert asks()
        assert not asks(batch=15)
        assert not asks(cell="gru_textbook")
        assert not asks(w=weights[1][:, :31])
        assert not asks(rows[:0])
        assert not asks(rows.double())
    with precision("high"):
        assert not asks()
    with torch.autocast("cpu", torch.float16):
        assert not asks()


@EVERY_CELL
def test_opcheck_and_compile(cell: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "lmfast":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    tensors = arguments(cell, (16, 3, 4, 32), torch.bfloat16)
    with Record():
        expected = with_gradients(call, cell, tensors)
    names = {str(function) for function, _ in calls}
    assert names == {f"lmfast.recurrent_bf16_{k}.default" for k in ("forward", "backward")}
    for function, args in calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(function, detached)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for f, e in zip(with_gradients(compiled, cell, tensors), expected, strict=True):
        torch.testing.assert_close(f, e)
    torch._dynamo.reset()
    with precision("medium"):
        wide = [t.float() for t in tensors]
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        expected = with_gradients(call, cell, wide)
        for f, e in zip(with_gradients(compiled, cell, wide), expected, strict=True):
            torch.testing.assert_close(f, e)
