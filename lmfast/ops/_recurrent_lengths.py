"""One recurrent layer over right-padded rows, each of a length of its own.

Eagerly the rows are sorted and packed, so that what is behind a row's end costs nothing. How many
they are then depends on numbers, which a graph and a meta tensor do not have: there one operator of
fixed sizes hides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lmfast.ops._autograd import apply
from lmfast.ops._library import LIBRARY, define, needs_grad
from lmfast.ops._recurrent_reference import Layer, Loop

Run = Callable[[Tensor, Layer, Loop], tuple[Tensor, Tensor, Tensor]]

# How a layer over rows can be run, by the names that the operator knows them by.
_RUNS: dict[str, Run] = {}


def named_run(name: str, run: Run) -> Run:
    """Let the operator run a layer so, too; returns ``run``."""
    _RUNS[name] = run
    return run


def are_hidden(t: Tensor) -> bool:
    """Whether nothing may depend on a tensor's numbers: in a graph, or where there are none."""
    return torch.compiler.is_compiling() or t.is_meta or isinstance(t, FakeTensor)


def over_lengths(
    run: Run, x: Tensor, layer: Layer, lengths: Tensor, cell: str, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``run`` on x (B, T, D): y (B, T, H), zero behind a row's end, and both final states (B, H).

    Args:
        run: a layer over rows.
        x, layer, cell, reverse: as of it; the cell state is empty unless it is an LSTM's.
        lengths: (B,) integers in 0..T; rows of length zero keep their state.
    """
    if are_hidden(x):
        name = next(name for name, known in _RUNS.items() if known is run)
        args = (*(x, *layer), lengths, cell, reverse, name)
        return apply(_PaddedFunction, *args) if needs_grad(x, *layer) else _forward_op(*args)
    batch, steps, width = x.shape
    hidden = layer.w_hh.shape[1]
    # Longest sequences first, rows of ended ones left out.
    ordered, order = lengths.cpu().sort(descending=True, stable=True)
    running = int((ordered > 0).sum())
    longest = int(ordered[0]) if running else 0
    time = torch.arange(longest)
    present = ordered[:running] > time[:, None]  # [T, B]
    rows_of = (order[:running] * steps + time[:, None])[present].to(x.device)
    back = order.argsort().to(x.device)
    order = order.to(x.device)

    def started(state: Tensor | None) -> Tensor:
        return x.new_zeros(batch, hidden) if state is None else state.index_select(0, order)

    h, c = started(layer.h0), started(layer.c0)
    rows = x.reshape(batch * steps, width).index_select(0, rows_of)
    given = layer._replace(h0=h[:running], c0=c[:running])
    y, h_n, c_n = run(rows, given, Loop(present.sum(1), running, cell, reverse))
    padded = x.new_zeros(batch * steps, hidden).index_copy(0, rows_of, y)
    h_n = torch.cat((h_n, h[running:])).index_select(0, back)
    if cell == "lstm":
        c_n = torch.cat((c_n, c[running:])).index_select(0, back)
    return padded.view(batch, steps, hidden), h_n, c_n


def _forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, steps, _), hidden, cell = x.shape, args[3].shape[1], args[7]
    states = [x.new_empty(n, hidden) for n in (batch, batch if cell == "lstm" else 0)]
    return x.new_empty(batch, steps, hidden), states[0], states[1]


def _backward_fake(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor, wanted: Sequence[bool], *args: Any
) -> list[Tensor]:
    leaves = [t for t, w in zip(args[:7], wanted, strict=True) if w]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in leaves]


_ARGUMENTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "Tensor lengths, str cell, bool reverse, str run"
)
_forward_op = define(
    f"recurrent_padded({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
_backward_op = define(
    "recurrent_padded_backward(Tensor dy, Tensor dh_n, Tensor dc_n, bool[] wanted, "
    f"{_ARGUMENTS}) -> Tensor[]",
    _backward_fake,
)


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    layer, (lengths, cell, reverse, run) = Layer(*args[:6]), args[6:]
    with torch.no_grad():
        found = over_lengths(_RUNS[run], x, layer, lengths, cell, reverse)
    return tuple(t.contiguous() for t in found)


def _backward(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor, wanted: Sequence[bool], *args: Any
) -> list[Tensor]:
    """The forward again and its gradients: a graph keeps nothing whose size depends on numbers."""
    given: list[Any] = [t if t is None else t.detach() for t in args[:7]]
    leaves = [t.requires_grad_() for t, w in zip(given, wanted, strict=True) if t is not None and w]
    lengths, cell, reverse, run = args[7:]
    # Compiled graphs run with autograd shut out, which enable_grad does not know of.
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
        found = over_lengths(_RUNS[run], given[0], Layer(*given[1:]), lengths, cell, reverse)
    pairs = [(t, g) for t, g in zip(found, (dy, dh_n, dc_n), strict=True) if t.requires_grad]
    outputs, grads = ([p[i] for p in pairs] for i in (0, 1))
    gradients = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
    return [g.contiguous() for g in gradients]


LIBRARY.impl("recurrent_padded", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("recurrent_padded_backward", _backward, "CompositeExplicitAutograd")


class _PaddedFunction(torch.autograd.Function):
    """x, the fields of a `Layer`, lengths, the cell, whether it runs backwards, and how."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rest = inputs[8:]
        if inputs[8] != "lstm":
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:8])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor) -> tuple[Any, ...]:
        wanted = list(ctx.needs_input_grad[:7])
        found = iter(_backward_op(dy, dh_n, dc_n, wanted, *ctx.saved_tensors, *ctx.rest))
        return *(next(found) if w else None for w in wanted), None, None, None, None
