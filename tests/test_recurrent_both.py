"""Both directions of a layer in one operator: the numbers of one after the other, any threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lmfast
from lmfast.ops import _recurrent_both
from lmfast.ops._recurrent import cpu_layer
from lmfast.ops._recurrent_both import cpu_both_ways
from lmfast.ops._recurrent_reference import CELLS, GATES, Layer, Loop, reference_layer

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
SIZES = torch.tensor([5, 5, 3, 1])


def arguments(cell: str, batch: int, rows: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """x, then h0, c0, w_ih, w_hh, b_ih, b_hh of each direction."""
    width, gates = 6, GATES[cell] * hidden
    shapes = [(batch, hidden)] * 2 + [(gates, width), (gates, hidden), (gates,), (gates,)]
    tensors = [torch.randn(s) * hidden**-0.5 for s in [*shapes, *shapes]]
    return [t.to(dtype).requires_grad_() for t in [torch.randn(rows, width), *tensors]]


def outputs(cell: str, tensors: list[Tensor], sizes: Tensor | None, batch: int) -> list[Tensor]:
    ways = Layer(*tensors[1:7]), Layer(*tensors[7:])
    found = cpu_both_ways(tensors[0], *ways, Loop(sizes, batch, cell, False))
    return [t for way in found for t in (way if cell == "lstm" else way[:2])]


def with_gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((r * torch.linspace(-1, 1, r.numel()).view_as(r)).sum() for r in results)
    return [*results, *torch.autograd.grad(loss, leaves, allow_unused=True)]


@EVERY_CELL
@pytest.mark.parametrize("hidden", [33, 150])
@pytest.mark.parametrize("sizes", [SIZES, None], ids=["packed", "padded"])
def test_equals_one_direction_after_the_other_for_any_threads(
    cell: str, hidden: int, sizes: Tensor | None, needs_cpu_kernels: None
) -> None:
    batch, rows = (5, 14) if sizes is not None else (2, 8)
    tensors = arguments(cell, batch, rows, hidden, torch.float32)
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            runs.append(with_gradients(outputs(cell, tensors, sizes, batch), tensors))
    finally:
        torch.set_num_threads(threads)
    single: list[Tensor] = []
    for i in range(2):
        layer = Layer(*tensors[1 + 6 * i : 7 + 6 * i])
        way = cpu_layer(tensors[0], layer, Loop(sizes, batch, cell, i == 1))
        single += way if cell == "lstm" else way[:2]
    expected = with_gradients(single, tensors)
    for found in runs:
        for f, first, e in zip(found, runs[0], expected, strict=True):
            if e is None:
                assert f is None
            elif lmfast._extension.cpu_isa() == "default":  # products are PyTorch's
                torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(f, first)
                assert torch.equal(f, e)


def reference(cell: str, tensors: list[Tensor], batch: int) -> list[Tensor]:
    results: list[Tensor] = []
    for i in range(2):
        way = Layer(*tensors[1 + 6 * i : 7 + 6 * i])
        found = reference_layer(tensors[0], way, Loop(None, batch, cell, i == 1))
        results += found if cell == "lstm" else found[:2]
    return results


@EVERY_CELL
@pytest.mark.parametrize("asked", [slice(None), slice(0, 1), slice(1, 2), slice(-1, None)])
def test_missing_states_biases_and_gradients(
    cell: str, asked: slice, needs_cpu_kernels: None
) -> None:
    tensors = arguments(cell, 3, 9, 20, torch.float32)
    for without in ([1, 2], [1, 2, 7, 8], [5, 6, 11, 12], [6, 12], [8]):
        given: list[Any] = [None if i in without else t for i, t in enumerate(tensors)]
        leaves = [t for t in given if t is not None]
        found, exact = (
            with_gradients(results[asked], leaves)
            for results in (outputs(cell, given, None, 3), reference(cell, given, 3))
        )
        for f, e in zip(found, exact, strict=True):
            if f is None or e is None:  # of the direction that was not asked for: zeros do as well
                assert all(t is None or not t.any() for t in (f, e))
            else:
                torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-5)


@EVERY_CELL
def test_gradients_of_gradients(cell: str, needs_cpu_kernels: None) -> None:
    tensors = arguments(cell, 2, 6, 9, torch.float32)
    found = []
    for exact in (False, True):
        leaves = [t.detach().to(torch.float64 if exact else torch.float32) for t in tensors]
        leaves = [t.requires_grad_() for t in leaves]
        y = outputs(cell, leaves, None, 2)
        (dx,) = torch.autograd.grad(y[0].square().sum() + y[-1].sum(), leaves[0], create_graph=True)
        wanted = [leaves[3], leaves[4], leaves[9], leaves[10]]
        found.append(torch.autograd.grad(dx.square().sum(), wanted, allow_unused=True))
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-5)


@EVERY_CELL
def test_opcheck(cell: str, needs_cpu_kernels: None) -> None:
    tensors = [t.detach() for t in arguments(cell, 3, 9, 20, torch.float32)]
    ways = tensors[1:7], tensors[7:]
    gates = [torch.randn(9, GATES[cell] * 20) for _ in ways]
    lstm = cell == "lstm"
    states = [[w[0] for w in ways], [w[1] for w in ways] if lstm else []]
    w_hh, index = [w[3] for w in ways], CELLS.index(cell)
    call = (gates, w_hh, [], *states, None, 3, index, True)
    torch.library.opcheck(_recurrent_both._forward_op, call)
    results = _recurrent_both._forward_op(*call)
    y, kept, cells = (results[k::5] for k in (0, 3, 4))
    grads = [torch.randn_like(t) for t in y]
    torch.library.opcheck(
        _recurrent_both._backward_op,
        (grads, [], [], y, kept, cells, w_hh, *states, None, 3, index),
    )
    with pytest.raises(RuntimeError, match="w_hh must have 2 tensors, got 1"):
        _recurrent_both._forward_op(gates, w_hh[:1], [], *states, None, 3, index, True)
