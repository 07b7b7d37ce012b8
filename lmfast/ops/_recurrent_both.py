"""Both directions of a recurrent layer in one call: on different threads where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmfast._transforms import transform_of
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import define, needs_grad
from lmfast.ops._recurrent import cpu_layer, forward_fake, input_product
from lmfast.ops._recurrent_bf16 import runs_in_bf16
from lmfast.ops._recurrent_products import gradients_fake, gradients_of_products
from lmfast.ops._recurrent_reference import Layer, Loop, loop_arguments, reference_layer

_Found = tuple[Tensor, Tensor, Tensor]

_WAYS = (False, True)  # reverse
_FIELDS = len(Layer._fields)


def _forward_both_fake(projected: Sequence[Tensor], *args: Any) -> list[Tensor]:
    w_hh, *_, sizes, batch, cell, keep = args
    none = (None, None, None)
    return [
        t
        for like, w, reverse in zip(projected, w_hh, _WAYS, strict=True)
        for t in forward_fake(like, w, *none, sizes, batch, cell, reverse, keep)
    ]


def _backward_both_fake(*args: Any) -> list[Tensor]:
    y, w_hh, (batch, cell) = args[3], args[6], args[10:]
    return [
        t for rows, w in zip(y, w_hh, strict=True) for t in gradients_fake(rows, w, batch, cell)
    ]


# Lists hold the forward direction and the reverse one, or nothing for None.
_forward_op = define(
    "recurrent_forward_both(Tensor[] projected, Tensor[] w_hh, Tensor[] hidden_bias, Tensor[] h0, "
    "Tensor[] c0, Tensor? batch_sizes, SymInt batch, int cell, bool keep) -> Tensor[]",
    _forward_both_fake,
)
_backward_op = define(
    "recurrent_backward_both(Tensor[] dy, Tensor[] dh_n, Tensor[] dc_n, Tensor[] y, "
    "Tensor[] gates, Tensor[] cells, Tensor[] w_hh, Tensor[] h0, Tensor[] c0, "
    "Tensor? batch_sizes, SymInt batch, int cell) -> Tensor[]",
    _backward_both_fake,
)


def listed(*tensors: Tensor | None) -> list[Tensor]:
    """All of them contiguous, zeros for a missing one; none if all are missing."""
    there = next((t for t in tensors if t is not None), None)
    if there is None:
        return []
    return [torch.zeros_like(there) if t is None else t.contiguous() for t in tensors]


def layers_of(args: Sequence[Any]) -> list[Layer]:
    """The layers whose fields ``args`` are."""
    return [Layer(*args[i : i + _FIELDS]) for i in range(0, len(args), _FIELDS)]


class _BothWays(torch.autograd.Function):
    """x, the fields of both layers and of the loop, and whether a backward will follow."""

    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        ways, loop, keep = layers_of(args[:-5]), Loop(*args[-5:-1]), args[-1]
        products = [input_product(x, way, loop.cell) for way in ways]
        results: list[Tensor] = _forward_op(
            [p for p, _ in products],
            [way.w_hh for way in ways],
            listed(*(bias for _, bias in products)),
            listed(*(way.h0 for way in ways)),
            listed(*(way.c0 for way in ways)),
            *loop_arguments(loop)[:3],
            keep,
        )
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sizes, *ctx.loop = inputs[-5:-1]
        ctx.set_materialize_grads(False)
        kept = [*output[3:5], *output[8:10]]
        if ctx.loop[1] != "lstm":
            kept += [output[2], output[7]]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*inputs[:-5], sizes, *output)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint computes them again for each access
        *inputs, sizes = saved[:-10]
        outputs = saved[-10:-5], saved[-5:]
        loop = Loop(sizes, *ctx.loop)
        dy, dh, dc = (tuple(given[5 * i + k] for i in range(2)) for k in range(3))
        if loop.cell != "lstm":
            dc = (None, None)  # torch.compile hands in zeros for a result without a gradient
        nothing = (None,) * 5
        if all(g is None for g in (*dy, *dh, *dc)):
            return *(None for _ in inputs), *nothing
        if recording_backward():
            both = partial(_reference_both, loop=loop)
            wanted = tuple(g for i in range(2) for g in (dy[i], dh[i], dc[i]))
            return *differentiate(both, inputs, wanted), *nothing
        x, ways = inputs[0], layers_of(inputs[1:])
        with torch.autocast("cpu", enabled=False):
            results = _backward_op(
                listed(*dy),
                listed(*dh),
                listed(*dc),
                *([o[k] for o in outputs] for k in (0, 3, 4)),
                [way.w_hh for way in ways],
                listed(*(way.h0 for way in ways)),
                listed(*(way.c0 for way in ways)),
                *loop_arguments(loop)[:3],
            )
            needed = ctx.needs_input_grad
            dx: Tensor | None = None
            grads: list[Tensor | None] = []
            for i, way in enumerate(ways):
                found = gradients_of_products(
                    (needed[0], *needed[1 + _FIELDS * i : 1 + _FIELDS * (i + 1)]),
                    x,
                    way,
                    loop._replace(reverse=_WAYS[i]),
                    (outputs[i][0], outputs[i][4]),
                    results[2 * i],
                    results[2 * i + 1],
                    dh[i],
                )
                if found[0] is not None:
                    dx = found[0] if dx is None else dx.add_(found[0])
                grads += found[1:]
        return dx, *grads, *nothing


def _reference_both(x: Tensor, *args: Any, loop: Loop) -> tuple[Tensor, ...]:
    return tuple(
        t
        for way, reverse in zip(layers_of(args), _WAYS, strict=True)
        for t in reference_layer(x, way, loop._replace(reverse=reverse))
    )


def is_plain_fp32(t: Tensor) -> bool:
    """An fp32 tensor, and not a DTensor, which an operator of many results does not take."""
    return t.dtype == torch.float32 and not hasattr(t, "placements")


def cpu_both_ways(x: Tensor, forward: Layer, reverse: Layer, loop: Loop) -> tuple[_Found, _Found]:
    """`cpu_layer` in both directions over the same rows.

    Args:
        x: (N, D).
        forward, reverse: what each direction has.
        loop: see there; its direction is not looked at.

    Returns:
        y, h_n and c_n of each direction.
    """
    tensors = (x, *forward, *reverse)
    plain = all(t is None or is_plain_fp32(t) for t in tensors)
    narrow = runs_in_bf16(x, forward.w_hh, loop.batch, loop.cell)
    if not plain or narrow or torch.is_autocast_enabled("cpu") or transform_of(*tensors):
        return (
            cpu_layer(x, forward, loop._replace(reverse=False)),
            cpu_layer(x, reverse, loop._replace(reverse=True)),
        )
    keep = needs_grad(*tensors)
    run: Any = (lambda *args: apply(_BothWays, *args)) if keep else _BothWays.forward
    found = run(*tensors, *loop, keep)
    return found[0:3], found[5:8]
