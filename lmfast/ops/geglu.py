"""GeGLU: the gated linear unit of Gemma-style models, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
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
from lmfast.testing import Sample


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    approximate: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """Multiplies by the GELU of the gate.

    ``y = gelu(gate) * up``; ``gelu(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``, or
    exactly ``x (1 + erf(x / sqrt(2))) / 2``; computed in fp32 (fp64 for fp64) and rounded once.
    The backward computes the activation again: only the inputs are saved.

    Args:
        gate: (..., N), float32, bfloat16, float16 or float64; any strides: the halves of one
            packed projection are read where they lie. Without ``up``, (..., 2 N): the gate is the
            first half of the last dimension and up the second, and so are the gradients, which
            saves joining them.
        up: as gate, or None.
        approximate: "tanh", as in Gemma, or "none" for the exact function; the names of
            ``torch.nn.functional.gelu``, whose default is the other one.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (..., N) in gate's dtype, contiguous.

    Raises:
        TypeError: gate or up is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, gate without up has an odd last dimension, or
            ``approximate`` is another word.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), triton, torch. Gradients on all; gradients of gradients through PyTorch.

    Source:
        Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202; Hendrycks and Gimpel,
        Gaussian Error Linear Units, 2016, arXiv:1606.08415.

    Example:
        >>> import lmfast, torch
        >>> lmfast.ops.geglu(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([5.0, 2.0, 2.0]))
        tensor([ 0.0000,  1.6824, -0.3176])
    """
    if may_run_at_once("geglu", backend) and approximate in ("tanh", "none"):
        try:
            if on_cpu(gate, up) and not needs_grad(gate, up):
                return _forward_op(gate, up, approximate == "tanh")
        except REFUSALS:
            pass
    args = _check(gate, up, approximate=approximate)
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _reference(*args)
    if needs_grad(gate, up):
        return apply(Glu, gate, up, "geglu", chosen.backend, args[2])
    return chosen.forward(*args)


def check_approximate(approximate: object) -> None:
    """Raise ValueError for another formula than the two there are."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")


def _check(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> tuple[Any, ...]:
    check_glu_arguments(gate, up)
    check_approximate(approximate)
    return gate, up, approximate == "tanh"


def _reference(gate: Tensor, up: Tensor | None, tanh: bool) -> Tensor:
    return glu_reference(lambda x: F.gelu(x, approximate="tanh" if tanh else "none"), gate, up)


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    # Shapes and strides are swiglu's business: both run the same loops.
    for sample in glu_samples(device, dtype):
        if sample.name in ("3x77", "0x8", "packed", "strides differ", "far out"):
            yield sample
    for sample in glu_samples(device, dtype, approximate="none"):
        if sample.name in ("3x77", "packed", "far out"):
            yield Sample(f"{sample.name}, exact", sample.args, sample.kwargs)


_forward_op, _backward_op = define_glu("geglu", ", bool tanh")

OP = register_op(
    Op(
        name="geglu",
        public=geglu,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("gate", "up"),
    )
)

register("geglu", "cpu", ("cpu",), *launchers(_forward_op, _backward_op), unsupported_by_cpu)
