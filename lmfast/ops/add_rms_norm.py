"""RMSNorm of a sum: the residual connection and the norm that follows it, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    REFUSALS,
    check_same_device,
    check_tensor,
    define,
    may_run_at_once,
    needs_grad,
    on_cpu,
)
from lmfast.ops._library import with_unit_last_stride as _rows
from lmfast.ops.rms_norm import OP as RMS_NORM
from lmfast.ops.rms_norm import (
    check_norm_arguments,
    cpu_backward,
    sample_shapes,
    unsupported_by_norm_kernels,
)
from lmfast.testing import Sample


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the residual and normalises the sum.

    ``s = x + residual`` (rounded to the dtype), ``y = s / sqrt(mean(s^2) + eps) * weight``.

    Args:
        x: (..., E), float32, bfloat16, float16 or float64; any strides.
        residual: as x.
        weight: (E,) or None for ones; x's dtype or float32.
        eps: added to the mean square.
        backend: overrides the choice of implementation.

    Returns:
        (y, s), both (..., E) in x's dtype; s is the next residual.

    Raises:
        TypeError: an argument is not a floating-point tensor, or residual has another dtype.
        ValueError: shapes or devices differ.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), cuda (C++), triton, torch. Gradients on all.

    Source:
        As ``rms_norm``; fused with the addition as in every pre-norm Transformer kernel library.

    Example:
        >>> import lmfast, torch
        >>> y, s = lmfast.ops.add_rms_norm(torch.ones(2), torch.tensor([2.0, 6.0]))
        >>> s
        tensor([3., 7.])
    """
    if may_run_at_once("add_rms_norm", backend) and type(eps) is float:
        try:
            if on_cpu(x, residual, weight) and not needs_grad(x, residual, weight):
                return _forward_op(x, residual, weight, eps)
        except REFUSALS:
            pass
    args = _check(x, residual, weight, eps)
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _reference(*args)
    if needs_grad(x, residual, weight):
        return apply(_AddRMSNorm, *args, chosen.backend)
    return chosen.forward(*args)


def _check(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Any, ...]:
    check_norm_arguments(x, weight, eps)
    check_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
    check_same_device("residual", residual, "x", x)
    return x, residual, weight, float(eps)


def _reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return RMS_NORM.reference(total, weight, eps), total


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    for shape in sample_shapes():
        name = "x".join(map(str, shape))
        yield Sample(name, (normal(*shape), normal(*shape), normal(*shape[-1:])))
    yield Sample("no weight", (normal(4, 33), normal(4, 33)), {"eps": 1e-5})
    yield Sample("strides differ", (normal(3, 5, 8), normal(5, 3, 8).transpose(0, 1), normal(8)))
    yield Sample("cancels", (normal(2, 8), torch.zeros(2, 8, device=device).to(dtype), normal(8)))


def _fake(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


_forward_op = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)", _fake
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return implementation("add_rms_norm", backend).forward(x, residual, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, weight, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Any, ...]:
        total, weight = ctx.saved_tensors
        if dy is None:
            return dsum, dsum, None, None, None
        if recording_backward():
            dx, dweight = differentiate(
                lambda x, w: RMS_NORM.reference(x, w, ctx.eps), (total, weight), (dy,)
            )
            if dsum is not None and dx is not None:
                dx = dx + dsum
            return dx, dx, dweight, None, None
        backward = implementation("add_rms_norm", ctx.backend).backward
        assert backward is not None
        need_dweight = weight is not None and ctx.needs_input_grad[2]
        dx, dweight = backward(dy, total, weight, ctx.eps, dsum, need_dweight)
        return dx, dx, dweight if need_dweight else None, None, None


def _cpu_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    weight = None if weight is None else weight.contiguous()
    return _forward_op(_rows(x), _rows(residual), weight, eps)


OP = register_op(
    Op(
        name="add_rms_norm",
        public=add_rms_norm,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("x", "residual", "weight"),
    )
)

register(
    "add_rms_norm",
    "cpu",
    ("cpu",),
    _cpu_forward,
    cpu_backward,
    lambda x, residual, weight, eps: unsupported_by_norm_kernels(x, weight, residual),
)
