"""One time step of a stack of recurrent layers in one operator call: streams and generation.

A step of a small layer is a few microseconds of work. The loop over a sequence packs W_hh first and
leaves the input's product to PyTorch, which pays from a few steps on; here weights are read where
they lie, and all layers run in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmfast import _dispatch, _extension
from lmfast._transforms import in_transform
from lmfast.ops._library import define
from lmfast.ops._recurrent_reference import CELLS

# Rows up to which the step is faster than the loop with packed weights, H = 128 to 512.
MAX_ROWS = 16

_FLOAT = torch.float32


def _fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    layers: int,
    cell: int,
    right: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if any(w.device != x.device for w in weights):
        # With parameters on meta PyTorch would take these empty tensors for the result.
        raise RuntimeError("weights must be on the device of x")
    hidden = weights[1].shape[0 if right else 1]
    states = x.new_empty(layers, x.numel() // x.shape[-1], hidden)
    lstm = CELLS[cell] == "lstm"
    y = x.new_empty(*x.shape[:-1], hidden)
    return y, states, torch.empty_like(states) if lstm else x.new_empty(0)


# x (..., D), B rows; h0, c0 (layers, B, H). weights: for each layer w_ih and w_hh (G*H, ...),
# and none, one or two biases. right: the matrices are (..., G*H).
step_op = define(
    "recurrent_step(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, int layers, int cell, "
    "bool right) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def may_step(op: str) -> bool:
    """Whether a call that autograd does not record may go to the operator, whatever its tensors."""
    return (
        _extension.cpu.loaded
        and not torch.is_grad_enabled()
        and not _dispatch.is_requested(op)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not in_transform()
    )


def is_plain(t: object) -> bool:
    """Whether ``t`` is what the operator takes: a contiguous float32 tensor on the CPU."""
    return isinstance(t, Tensor) and t.dtype is _FLOAT and t.is_cpu and t.is_contiguous()
