"""A stack of recurrent layers in one call: layer by layer in time, as a wavefront over threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import define, needs_grad
from lmfast.ops._linear_cpu import has_plain_product, longest_chain, matrix
from lmfast.ops._recurrent import backward_fake, forward_fake
from lmfast.ops._recurrent_both import listed
from lmfast.ops._recurrent_products import gradients_of_products, split_biases
from lmfast.ops._recurrent_reference import CELLS, GATES, reference_layer

# Recurrent weights of a layer, and times rows, up to which one thread is as fast as two with a
# barrier to a step. Asked of the shape alone: results do not depend on the number of threads.
_MOST_WEIGHTS, _MOST_WORK = 1 << 16, 1 << 17
_LEAST_STEPS = 32

_PER_LAYER = 6  # h0, c0, w_ih, w_hh, b_ih, b_hh


def _forward_fake(
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    bias: Sequence[Tensor],
    hidden_bias: Sequence[Tensor],
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    batch_sizes: Tensor | None,
    batch: int,
    cell: int,
    keep: bool,
    chunks: Sequence[int],
) -> list[Tensor]:
    none = (None, None, None)
    return [
        t for w in w_hh for t in forward_fake(x, w, *none, batch_sizes, batch, cell, False, keep)
    ]


def _backward_fake(
    dy: Tensor | None,
    dh_n: Sequence[Tensor],
    dc_n: Sequence[Tensor],
    y: Sequence[Tensor],
    gates: Sequence[Tensor],
    cells: Sequence[Tensor],
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    h0: Sequence[Tensor],
    c0: Sequence[Tensor],
    batch_sizes: Tensor | None,
    batch: int,
    cell: int,
    chunk: int,
) -> list[Tensor]:
    none = (None, None, None)
    return [
        t
        for i, w in enumerate(w_hh)
        for t in backward_fake(
            *none, y[i], gates[i], cells[i], w, None, None, batch_sizes, batch, cell, False
        )
    ]


# Lists hold the layers, the lowest first, or nothing for None.
_forward_op = define(
    "recurrent_forward_stack(Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[] bias, "
    "Tensor[] hidden_bias, Tensor[] h0, Tensor[] c0, Tensor? batch_sizes, int batch, int cell, "
    "bool keep, int[] chunks) -> Tensor[]",
    _forward_fake,
)
_backward_op = define(
    "recurrent_backward_stack(Tensor? dy, Tensor[] dh_n, Tensor[] dc_n, Tensor[] y, "
    "Tensor[] gates, Tensor[] cells, Tensor[] w_ih, Tensor[] w_hh, Tensor[] h0, Tensor[] c0, "
    "Tensor? batch_sizes, int batch, int cell, int chunk) -> Tensor[]",
    _backward_fake,
)


def _by_layer(args: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(args[i : i + _PER_LAYER]) for i in range(0, len(args), _PER_LAYER)]


class _Stack(torch.autograd.Function):
    """x, then h0, c0, w_ih, w_hh, b_ih, b_hh of each layer, then batch_sizes, batch, cell, keep."""

    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        layers, (sizes, batch, cell, keep) = _by_layer(args[:-4]), args[-4:]
        h0, c0, w_ih, w_hh, b_ih, b_hh = zip(*layers, strict=True)
        biases = [split_biases(b_ih[i], b_hh[i], w_hh[i], cell) for i in range(len(layers))]
        chunks = [longest_chain(x.shape[1]), longest_chain(w_hh[0].shape[1])]
        results: list[Tensor] = _forward_op(
            x.contiguous(),
            [matrix(w) for w in w_ih],
            w_hh,
            *(listed(*b) for b in zip(*biases, strict=True)),
            listed(*h0),
            listed(*c0),
            sizes,
            batch,
            CELLS.index(cell),
            keep,
            chunks,
        )
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sizes, ctx.batch, ctx.cell, _ = inputs[-4:]
        ctx.set_materialize_grads(False)
        # Of each layer y, h_n, c_n, gates, cells: only the highest layer's y is a result.
        inner = [t for i, t in enumerate(output[:-5]) if i % 5 == 0]
        kept = [t for i, t in enumerate(output) if i % 5 > (2 if ctx.cell == "lstm" else 1)]
        ctx.mark_non_differentiable(*inner, *kept)
        ctx.inputs = len(inputs) - 4
        ctx.save_for_backward(*inputs[:-4], sizes, *output)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, sizes, outputs = saved[: ctx.inputs], saved[ctx.inputs], saved[ctx.inputs + 1 :]
        y, _, _, gates, cells = (outputs[k::5] for k in range(5))
        dy, dh, dc = given[-5], given[1::5], given[2::5]
        if ctx.cell != "lstm":
            dc = (None,) * len(dh)  # torch.compile hands in zeros for a result without a gradient
        nothing = (None,) * 4
        if dy is None and all(g is None for g in (*dh, *dc)):
            return (None,) * (ctx.inputs + 4)
        if recording_backward():
            stack = partial(_reference, batch_sizes=sizes, batch=ctx.batch, cell=ctx.cell)
            return *differentiate(stack, inputs, (dy, *dh, *dc)), *nothing
        x, layers = inputs[0], _by_layer(inputs[1:])
        h0, c0, w_ih, w_hh, _, _ = zip(*layers, strict=True)
        with torch.autocast("cpu", enabled=False):
            found: list[Tensor] = _backward_op(
                None if dy is None else dy.contiguous(),
                listed(*dh),
                listed(*dc),
                y,
                gates,
                cells,
                [matrix(w) for w in w_ih[1:]],
                w_hh,
                listed(*h0),
                listed(*c0),
                sizes,
                ctx.batch,
                CELLS.index(ctx.cell),
                longest_chain(w_hh[0].shape[0]),
            )
            needed, how = ctx.needs_input_grad, (sizes, ctx.batch, ctx.cell, False)
            dx: Tensor | None = None
            grads: list[Tensor | None] = []
            for i, layer in enumerate(layers):
                first = 1 + i * _PER_LAYER
                of_layer = gradients_of_products(
                    (needed[0] and i == 0, *needed[first : first + _PER_LAYER]),
                    (x if i == 0 else y[i - 1], layer[0], layer[2], layer[3]),
                    how,
                    (y[i], cells[i]),
                    found[2 * i],
                    found[2 * i + 1],
                    dh[i],
                )
                dx = of_layer[0] if i == 0 else dx
                grads += of_layer[1:]
        return dx, *grads, *nothing


def _reference(x: Tensor, *args: Any, **how: Any) -> tuple[Tensor, ...]:
    """y, then h_n of each layer, then c_n of each."""
    layer: Any = reference_layer
    finals = []
    for given in _by_layer(args):
        x, h_n, c_n = layer(x, *given, reverse=False, **how)
        finals.append((h_n, c_n))
    return x, *(h for h, _ in finals), *(c for _, c in finals)


def runs_as_wavefront(
    x: Tensor, layers: Sequence[tuple[Any, ...]], batch_sizes: Tensor | None, batch: int, cell: str
) -> bool:
    """Whether `cpu_stack` takes a stack, and is at least as fast as one layer after the other."""
    w_hh = layers[0][3]
    weights = w_hh.shape[1] ** 2 * GATES[cell]
    steps = len(batch_sizes) if batch_sizes is not None else x.shape[0] // max(1, batch)
    if len(layers) < 2 or steps < _LEAST_STEPS or weights * max(1, batch) > _MOST_WORK:
        return False
    if weights > _MOST_WEIGHTS or torch.is_autocast_enabled("cpu") or x.shape[1] == 0:
        return False
    tensors = [x, *(t for layer in layers for t in layer)]
    return has_plain_product() and all(t is None or t.dtype == torch.float32 for t in tensors)


def cpu_stack(
    x: Tensor, layers: Sequence[tuple[Any, ...]], batch_sizes: Tensor | None, batch: int, cell: str
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`cpu_layer` forward in time, once for each layer on the rows of the one below it.

    Args:
        x: (N, D).
        layers: h0, c0, w_ih, w_hh, b_ih, b_hh of each, the lowest first; all of one width.
        batch_sizes, batch, cell: as in ``reference_layer``.

    Returns:
        y of the highest layer, and (h_n, c_n) of each.
    """
    tensors = (x, *(t for layer in layers for t in layer))
    keep = needs_grad(*tensors)
    run: Any = (lambda *args: apply(_Stack, *args)) if keep else _Stack.forward
    found = run(*tensors, batch_sizes, batch, cell, keep)
    return found[-5], list(zip(found[1::5], found[2::5], strict=True))
