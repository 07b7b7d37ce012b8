"""A stack of recurrent layers in one call: layer by layer in time, as a wavefront over threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmfast._transforms import transform_of
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import define, needs_grad
from lmfast.ops._linear_cpu import has_plain_product, longest_chain, matrix
from lmfast.ops._recurrent import forward_fake
from lmfast.ops._recurrent_both import is_plain_fp32, layers_of, listed
from lmfast.ops._recurrent_products import gradients_fake, gradients_of_products, split_biases
from lmfast.ops._recurrent_reference import GATES, Layer, Loop, loop_arguments, reference_layer

# Recurrent weights of a layer, and times rows, up to which one thread is as fast as two with a
# barrier to a step. Asked of the shape alone: results do not depend on the number of threads.
_MOST_WEIGHTS, _MOST_WORK = 1 << 16, 1 << 17
_LEAST_STEPS = 32


def _forward_fake(x: Tensor, *args: Any) -> list[Tensor]:
    w_hh, (sizes, batch, cell, keep, _) = args[1], args[6:]
    none = (None, None, None)
    return [t for w in w_hh for t in forward_fake(x, w, *none, sizes, batch, cell, False, keep)]


def _backward_fake(*args: Any) -> list[Tensor]:
    y, w_hh, (batch, cell) = args[3], args[7], args[11:13]
    return [
        t for rows, w in zip(y, w_hh, strict=True) for t in gradients_fake(rows, w, batch, cell)
    ]


# Lists hold the layers, the lowest first, or nothing for None.
_forward_op = define(
    "recurrent_forward_stack(Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[] bias, "
    "Tensor[] hidden_bias, Tensor[] h0, Tensor[] c0, Tensor? batch_sizes, SymInt batch, int cell, "
    "bool keep, int[] chunks) -> Tensor[]",
    _forward_fake,
)
_backward_op = define(
    "recurrent_backward_stack(Tensor? dy, Tensor[] dh_n, Tensor[] dc_n, Tensor[] y, "
    "Tensor[] gates, Tensor[] cells, Tensor[] w_ih, Tensor[] w_hh, Tensor[] h0, Tensor[] c0, "
    "Tensor? batch_sizes, SymInt batch, int cell, SymInt chunk) -> Tensor[]",
    _backward_fake,
)


class _Stack(torch.autograd.Function):
    """x, the fields of the layers and of the loop, and whether a backward will follow."""

    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        layers, loop, keep = layers_of(args[:-5]), Loop(*args[-5:-1]), args[-1]
        h0, c0, w_ih, w_hh, _, _ = zip(*layers, strict=True)
        biases = [split_biases(layer.b_ih, layer.b_hh, loop.cell) for layer in layers]
        chunks = [longest_chain(x.shape[1]), longest_chain(w_hh[0].shape[1])]
        results: list[Tensor] = _forward_op(
            x.contiguous(),
            [matrix(w) for w in w_ih],
            w_hh,
            *(listed(*b) for b in zip(*biases, strict=True)),
            listed(*h0),
            listed(*c0),
            *loop_arguments(loop)[:3],
            keep,
            chunks,
        )
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sizes, *ctx.loop = inputs[-5:-1]
        ctx.set_materialize_grads(False)
        # Of each layer y, h_n, c_n, gates, cells: only the highest layer's y is a result.
        inner = [t for i, t in enumerate(output[:-5]) if i % 5 == 0]
        kept = [t for i, t in enumerate(output) if i % 5 > (2 if ctx.loop[1] == "lstm" else 1)]
        ctx.mark_non_differentiable(*inner, *kept)
        ctx.inputs = len(inputs) - 5
        ctx.save_for_backward(*inputs[:-5], sizes, *output)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, sizes, outputs = saved[: ctx.inputs], saved[ctx.inputs], saved[ctx.inputs + 1 :]
        loop = Loop(sizes, *ctx.loop)
        y, _, _, gates, cells = (outputs[k::5] for k in range(5))
        dy, dh, dc = given[-5], given[1::5], given[2::5]
        if loop.cell != "lstm":
            dc = (None,) * len(dh)  # torch.compile hands in zeros for a result without a gradient
        nothing = (None,) * 5
        if dy is None and all(g is None for g in (*dh, *dc)):
            return *(None for _ in inputs), *nothing
        if recording_backward():
            stack = partial(_reference, loop=loop)
            return *differentiate(stack, inputs, (dy, *dh, *dc)), *nothing
        x, layers = inputs[0], layers_of(inputs[1:])
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
                *loop_arguments(loop)[:3],
                longest_chain(w_hh[0].shape[0]),
            )
            needed = ctx.needs_input_grad
            dx: Tensor | None = None
            grads: list[Tensor | None] = []
            for i, layer in enumerate(layers):
                fields = len(layer)
                of_layer = gradients_of_products(
                    (needed[0] and i == 0, *needed[1 + i * fields : 1 + (i + 1) * fields]),
                    x if i == 0 else y[i - 1],
                    layer,
                    loop,
                    (y[i], cells[i]),
                    found[2 * i],
                    found[2 * i + 1],
                    dh[i],
                )
                dx = of_layer[0] if i == 0 else dx
                grads += of_layer[1:]
        return dx, *grads, *nothing


def _reference(x: Tensor, *args: Any, loop: Loop) -> tuple[Tensor, ...]:
    """y, then h_n of each layer, then c_n of each."""
    finals = []
    for layer in layers_of(args):
        x, h_n, c_n = reference_layer(x, layer, loop)
        finals.append((h_n, c_n))
    return x, *(h for h, _ in finals), *(c for _, c in finals)


def runs_as_wavefront(x: Tensor, layers: Sequence[Layer], loop: Loop) -> bool:
    """Whether `cpu_stack` takes a stack, and is at least as fast as one layer after the other."""
    weights, batch = layers[0].w_hh.shape[1] ** 2 * GATES[loop.cell], max(1, loop.batch)
    steps = x.shape[0] // batch if loop.batch_sizes is None else len(loop.batch_sizes)
    if isinstance(steps, torch.SymInt) and torch.compiler.is_exporting():
        return False  # an exported graph would be one for long or for short sequences only
    if len(layers) < 2 or loop.reverse or steps < _LEAST_STEPS or weights * batch > _MOST_WORK:
        return False
    if weights > _MOST_WEIGHTS or torch.is_autocast_enabled("cpu") or x.shape[1] == 0:
        return False
    tensors = [x, *(t for layer in layers for t in layer)]
    if transform_of(*tensors) or not has_plain_product():
        return False
    return all(t is None or (is_plain_fp32(t) and t.device == x.device) for t in tensors)


def cpu_stack(
    x: Tensor, layers: Sequence[Layer], loop: Loop
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`cpu_layer` forward in time, once for each layer on the rows of the one below it.

    Args:
        x: (N, D).
        layers: the lowest first, all of one width.
        loop: see there.

    Returns:
        y of the highest layer, and (h_n, c_n) of each.
    """
    tensors = (x, *(t for layer in layers for t in layer))
    keep = needs_grad(*tensors)
    run: Any = (lambda *args: apply(_Stack, *args)) if keep else _Stack.forward
    found = run(*tensors, *loop, keep)
    return found[-5], list(zip(found[1::5], found[2::5], strict=True))
