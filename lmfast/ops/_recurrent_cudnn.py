"""The recurrent layers on an NVIDIA GPU by cuDNN, through PyTorch's own operators.

cuDNN's layer is one call over all steps; the reference starts some ten kernels per step. What it
leaves out here is done around it: the order of reversed rows, absent biases, absent states. It
would multiply float32 in TF32 by default; this op's float32 stays float32 unless PyTorch's setting
for matrix products allows less, also when autograd runs the backward later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lmfast.ops._autograd import with_reference
from lmfast.ops._library import needs_grad
from lmfast.ops._precision import tf32_products_allowed
from lmfast.ops._recurrent_reference import Layer, Loop, flat_reference

_FUNCTIONS = {
    "tanh": torch.rnn_tanh,
    "relu": torch.rnn_relu,
    "lstm": torch.lstm,
    "gru": torch.gru,
}


def unsupported_by_cudnn(x: Tensor, *rest: Any) -> str | None:
    """Why cuDNN's layers cannot take these arguments, or None."""
    cell = rest[7]
    if cell not in _FUNCTIONS:
        return f"cuDNN has no {cell} cell"
    if torch.compiler.is_compiling():
        return "cuDNN's layers break a compiled graph"
    if torch._C._are_functorch_transforms_active():
        return "cuDNN's layers have no torch.func transforms"
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "cuDNN is not available, or switched off by torch.backends.cudnn.enabled"
    return None


@contextmanager
def _precision(reduced: bool) -> Iterator[None]:
    # Not `torch.backends.cudnn.flags`: it sets the convolutions' precision too, and raises where
    # the two differ.
    rnn: Any = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = "tf32" if reduced else "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = before


def _backwards(sizes: Tensor | None, steps: int, batch: int, device: torch.device) -> Tensor:
    """(N,) which row each row's counterpart is when every sequence runs from its end."""
    if sizes is None:
        time = torch.arange(steps - 1, -1, -1, device=device)
        return (time[:, None] * batch + torch.arange(batch, device=device)).flatten()
    lengths = (sizes[:, None] > torch.arange(batch)).sum(0)  # [B]
    starts = sizes.cumsum(0) - sizes  # [T]
    row = torch.arange(batch).expand(len(sizes), -1)
    present = row < sizes[:, None]
    time = lengths - 1 - torch.arange(len(sizes))[:, None]
    return (starts[time.clamp_min(0)] + row)[present].to(device)


def _run(tensors: tuple[Any, ...], loop: Loop, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = tensors
    batch_sizes, batch, cell, reverse = loop
    hidden, steps = w_hh.shape[1], x.shape[0] // batch
    order = _backwards(batch_sizes, steps, batch, x.device) if reverse else None
    if order is not None:
        x = x.index_select(0, order)
    weights = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        zeros = x.new_zeros(w_hh.shape[0])
        weights += [zeros if b is None else b for b in (b_ih, b_hh)]
    h, c = (x.new_zeros(batch, hidden) if s is None else s for s in (h0, c0))
    state = (h[None], c[None]) if cell == "lstm" else h[None]
    settings = (state, weights, len(weights) == 4, 1, 0.0, training, False)
    function: Any = _FUNCTIONS[cell]
    if batch_sizes is None:
        y, *final = function(x.view(steps, batch, -1), *settings, False)
        y = y.reshape(x.shape[0], hidden)
    else:
        y, *final = function(x, batch_sizes, *settings)
    if order is not None:
        y = y.index_select(0, order)
    last = final[1][0] if cell == "lstm" else y.new_zeros(0, hidden)
    return y, final[0][0], last


def cudnn_layer(x: Tensor, layer: Layer, loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
    """``reference_layer`` by PyTorch's whole-sequence operators."""
    if x.shape[0] == 0:
        zeros = x.new_zeros(loop.batch, layer.w_hh.shape[1])
        h, c = (zeros if s is None else s for s in (layer.h0, layer.c0))
        # Gradients are zeros, not missing.
        nothing = (x.sum() + layer.w_ih.sum() + layer.w_hh.sum()) * 0.0
        for b in (layer.b_ih, layer.b_hh):
            nothing = nothing if b is None else nothing + b.sum() * 0.0
        y = h[:0].expand(0, -1) + nothing
        return y, h + nothing, c + nothing if loop.cell == "lstm" else c[:0]
    tensors = (x, *layer)
    reduced = tf32_products_allowed()
    if needs_grad(*tensors):
        found = with_reference(
            lambda *given: _run(given, loop, training=True),
            lambda *given: flat_reference(*given, loop=loop),
            tensors,
            lambda: _precision(reduced),
        )
        return found[0], found[1], found[2]
    with _precision(reduced):
        return _run(tensors, loop, training=False)
