"""Both directions of a recurrent layer in one call: on different threads where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import define, needs_grad
from lmfast.ops._recurrent import backward_fake, cpu_layer, forward_fake, input_product
from lmfast.ops._recurrent_bf16 import runs_in_bf16
from lmfast.ops._recurrent_products import gradients_of_products
from lmfast.ops._recurrent_reference import CELLS, reference_layer

_Layer = tuple[Tensor, Tensor, Tensor]

# Their arguments arrive in tuples here.
_one_way: Any = cpu_layer
_one_reference: Any = reference_layer


def _at(tensors: Sequence[Tensor], direction: int) -> Tensor | None:
    return tensors[direction] if tensors else None


def _forward_both_fake(
    projected: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    hidden_bias: Sequence[Tensor],
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    batch_sizes: Tensor | None,
    batch: int,
    cell: int,
    keep: bool,
) -> list[Tensor]:
    return [
        t
        for i in range(2)
        for t in forward_fake(
            projected[i], w_hh[i], None, None, None, batch_sizes, batch, cell, i == 1, keep
        )
    ]


def _backward_both_fake(
    dy: Sequence[Tensor],
    dh_n: Sequence[Tensor],
    dc_n: Sequence[Tensor],
    y: Sequence[Tensor],
    gates: Sequence[Tensor],
    cells: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    batch_sizes: Tensor | None,
    batch: int,
    cell: int,
) -> list[Tensor]:
    none = (None, None, None)
    return [
        t
        for i in range(2)
        for t in backward_fake(
            *none, y[i], gates[i], cells[i], w_hh[i], None, None, batch_sizes, batch, cell, i == 1
        )
    ]


# Lists hold the forward direction and the reverse one, or nothing for None.
_forward_op = define(
    "recurrent_forward_both(Tensor[] projected, Tensor[] w_hh, Tensor[] hidden_bias, Tensor[] h0, "
    "Tensor[] c0, Tensor? batch_sizes, int batch, int cell, bool keep) -> Tensor[]",
    _forward_both_fake,
)
_backward_op = define(
    "recurrent_backward_both(Tensor[] dy, Tensor[] dh_n, Tensor[] dc_n, Tensor[] y, "
    "Tensor[] gates, Tensor[] cells, Tensor[] w_hh, Tensor[] h0, Tensor[] c0, "
    "Tensor? batch_sizes, int batch, int cell) -> Tensor[]",
    _backward_both_fake,
)


def listed(*tensors: Tensor | None) -> list[Tensor]:
    """All of them contiguous, zeros for a missing one; none if all are missing."""
    there = next((t for t in tensors if t is not None), None)
    if there is None:
        return []
    return [torch.zeros_like(there) if t is None else t.contiguous() for t in tensors]


class _BothWays(torch.autograd.Function):
    """x, then h0, c0, w_ih, w_hh, b_ih, b_hh of the forward direction and of the reverse one."""

    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        sizes, batch, cell, keep = args[12:]
        ways = args[:6], args[6:12]
        products = [input_product(x, way[2], way[3], way[4], way[5], cell) for way in ways]
        results: list[Tensor] = _forward_op(
            [p for p, _ in products],
            [way[3] for way in ways],
            listed(*(bias for _, bias in products)),
            listed(*(way[0] for way in ways)),
            listed(*(way[1] for way in ways)),
            sizes,
            batch,
            CELLS.index(cell),
            keep,
        )
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sizes, ctx.batch, ctx.cell, _ = inputs[13:]
        ctx.set_materialize_grads(False)
        kept = [*output[3:5], *output[8:10]]
        if ctx.cell != "lstm":
            kept += [output[2], output[7]]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*inputs[:13], sizes, *output)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, sizes, outputs = saved[:13], saved[13], (saved[14:19], saved[19:24])
        dy, dh, dc = (tuple(given[5 * i + k] for i in range(2)) for k in range(3))
        if ctx.cell != "lstm":
            dc = (None, None)  # torch.compile hands in zeros for a result without a gradient
        nothing = (None,) * 4
        if all(g is None for g in (*dy, *dh, *dc)):
            return (None,) * 17
        how = {"batch_sizes": sizes, "batch": ctx.batch, "cell": ctx.cell}
        if recording_backward():
            both = partial(_reference_both, **how)
            wanted = tuple(g for i in range(2) for g in (dy[i], dh[i], dc[i]))
            return *differentiate(both, inputs, wanted), *nothing
        x, ways = inputs[0], (inputs[1:7], inputs[7:13])
        with torch.autocast("cpu", enabled=False):
            results = _backward_op(
                listed(*dy),
                listed(*dh),
                listed(*dc),
                *([o[k] for o in outputs] for k in (0, 3, 4)),
                [way[3] for way in ways],
                listed(*(way[0] for way in ways)),
                listed(*(way[1] for way in ways)),
                sizes,
                ctx.batch,
                CELLS.index(ctx.cell),
            )
            needed = ctx.needs_input_grad
            dx: Tensor | None = None
            grads: list[Tensor | None] = []
            for i, way in enumerate(ways):
                found = gradients_of_products(
                    (needed[0], *needed[1 + 6 * i : 7 + 6 * i]),
                    (x, way[0], way[2], way[3]),
                    (sizes, ctx.batch, ctx.cell, i == 1),
                    (outputs[i][0], outputs[i][4]),
                    results[2 * i],
                    results[2 * i + 1],
                    dh[i],
                )
                if found[0] is not None:
                    dx = found[0] if dx is None else dx.add_(found[0])
                grads += found[1:]
        return dx, *grads, *nothing


def _reference_both(x: Tensor, *args: Any, **how: Any) -> tuple[Tensor, ...]:
    return tuple(
        t
        for i in range(2)
        for t in _one_reference(x, *args[6 * i : 6 * i + 6], reverse=i == 1, **how)
    )


def cpu_both_ways(
    x: Tensor,
    forward: tuple[Any, ...],
    reverse: tuple[Any, ...],
    batch_sizes: Tensor | None,
    batch: int,
    cell: str,
) -> tuple[_Layer, _Layer]:
    """`cpu_layer` in both directions over the same rows.

    Args:
        x: (N, D).
        forward, reverse: h0, c0, w_ih, w_hh, b_ih, b_hh of each direction.
        batch_sizes, batch, cell: as in ``reference_layer``.

    Returns:
        y, h_n and c_n of each direction.
    """
    tensors = (x, *forward, *reverse)
    plain = all(t is None or t.dtype == torch.float32 for t in tensors)
    if not plain or torch.is_autocast_enabled("cpu") or runs_in_bf16(x, forward[3], batch, cell):
        first, second = (
            _one_way(x, *way, batch_sizes, batch, cell, i == 1)
            for i, way in enumerate((forward, reverse))
        )
        return first, second
    keep = needs_grad(*tensors)
    run: Any = (lambda *args: apply(_BothWays, *args)) if keep else _BothWays.forward
    found = run(*tensors, batch_sizes, batch, cell, keep)
    return found[0:3], found[5:8]
