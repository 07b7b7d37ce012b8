"""SwiGLU: the gated linear unit of Llama-style models, forward and backward."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lmfast._dispatch import Op, register, register_op, select
from lmfast.ops._autograd import apply
from lmfast.ops._glu import (
    Glu,
    check_glu_arguments,
    define_glu,
    glu_reference,
    glu_samples,
    launchers,
    unsupported_by_cpu,
)
from lmfast.ops._library import REFUSALS, may_run_at_once, needs_grad, on_cpu


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Multiplies by the SiLU of the gate.

    ``y = silu(gate) * up``, ``silu(x) = x / (1 + e^-x)``; computed in fp32 (fp64 for fp64) and
    rounded once. The backward computes the activation again: only the inputs are saved.

    Args:
        gate: (..., N), float32, bfloat16, float16 or float64; any strides: the halves of one
            packed projection are read where they lie. Without ``up``, (..., 2 N): the gate is the
            first half of the last dimension and up the second, and so are the gradients, which
            saves joining them.
        up: as gate, or None.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (..., N) in gate's dtype, contiguous.

    Raises:
        TypeError: gate or up is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, or gate without up has an odd last dimension.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), triton, torch. Gradients on all; gradients of gradients through PyTorch.

    Source:
        Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.

    Example:
        >>> import lmfast, torch
        >>> lmfast.ops.swiglu(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([5.0, 2.0, 2.0]))
        tensor([ 0.0000,  1.4621, -0.5379])
    """
    if may_run_at_once("swiglu", backend):
        try:
            if on_cpu(gate, up) and not needs_grad(gate, up):
                return _forward_op(gate, up)
        except REFUSALS:
            pass
    args = _check(gate, up)
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _reference(*args)
    if needs_grad(gate, up):
        return apply(Glu, gate, up, "swiglu", chosen.backend)
    return chosen.forward(*args)


def _check(gate: Tensor, up: Tensor | None = None) -> tuple[Any, ...]:
    check_glu_arguments(gate, up)
    return gate, up


def _reference(gate: Tensor, up: Tensor | None) -> Tensor:
    return glu_reference(F.silu, gate, up)


_forward_op, _backward_op = define_glu("swiglu")

OP = register_op(
    Op(
        name="swiglu",
        public=swiglu,
        reference=_reference,
        check=_check,
        sample_inputs=glu_samples,
        differentiable=("gate", "up"),
    )
)

register("swiglu", "cpu", ("cpu",), *launchers(_forward_op, _backward_op), unsupported_by_cpu)
