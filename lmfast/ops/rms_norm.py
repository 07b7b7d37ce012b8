"""RMSNorm: the root-mean-square normalisation of Transformer blocks, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    REFUSALS,
    accumulation_dtype,
    check_same_device,
    check_tensor,
    define,
    may_run_at_once,
    needs_grad,
    on_cpu,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.testing import Sample


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """Divides each row by its root mean square.

    ``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension. Sums are kept in fp32
    (fp64 for fp64 input) and the result is rounded once, at the end.

    Args:
        x: (..., E), float32, bfloat16, float16 or float64; any strides. Read in place whenever
            the last dimension is contiguous.
        weight: (E,) or None for ones; x's dtype or float32.
        eps: added to the mean square.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (..., E) in x's dtype.

    Raises:
        TypeError: x or weight is not a floating-point tensor.
        ValueError: weight has another length than x's last dimension, or lives elsewhere.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), cuda (C++), triton, torch. Gradients on all; gradients of gradients through
        PyTorch.

    Source:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.

    Example:
        >>> import lmfast, torch
        >>> lmfast.ops.rms_norm(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([0.3651, 0.7303, 1.0954, 1.4606])
    """
    if may_run_at_once("rms_norm", backend) and type(eps) is float:
        try:
            if on_cpu(x, weight) and not needs_grad(x, weight):
                return _forward_op(x, weight, eps)
        except REFUSALS:
            pass
    args = _check(x, weight, eps)
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _reference(*args)
    if needs_grad(x, weight):
        return apply(_RMSNorm, *args, chosen.backend)
    return chosen.forward(*args)


def check_norm_arguments(x: object, weight: object, eps: object) -> None:
    """The checks ``rms_norm`` and ``add_rms_norm`` share."""
    x = check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar tensor")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if weight is None:
        return
    weight = check_tensor("weight", weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have shape ({x.shape[-1]},), the size of x's last dimension, "
            f"got {tuple(weight.shape)}"
        )
    check_same_device("weight", weight, "x", x)


def _check(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Any, ...]:
    check_norm_arguments(x, weight, eps)
    return x, weight, float(eps)


def _reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    h = x.to(accumulation_dtype(x.dtype))
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype)


def sample_shapes() -> list[tuple[int, ...]]:
    """Odd on purpose: one, primes, one more than a vector, none, several leading dimensions."""
    return [(4, 16), (1, 1), (7,), (3, 769), (2, 3, 17), (5, 0), (0, 8), (129, 64), (2, 1031)]


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    for shape in sample_shapes():
        name = "x".join(map(str, shape))
        yield Sample(name, (normal(*shape), normal(*shape[-1:]), 1e-6))
    yield Sample("no weight", (normal(4, 33),), {"eps": 1e-5})
    yield Sample("fp32 weight", (normal(4, 33), normal(33).float()))
    yield Sample("heads", (normal(2, 5, 3, 16).transpose(1, 2), normal(16)))
    yield Sample("slice", (normal(6, 40)[::2, 3:27], normal(24)))
    yield Sample("last dimension strided", (normal(12, 6).t(), normal(12)))
    yield Sample("zero row", (torch.zeros(2, 8, device=device, dtype=dtype), normal(8), 1e-8))
    yield Sample("large", (normal(3, 64) * 100, normal(64)))


def _forward_fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dsum: Tensor | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    if weight is None or not need_dweight:
        return torch.empty_like(x), x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight)


_forward_op = define("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", _forward_fake)
# dsum: gradient that reaches x past the norm, added to dx (add_rms_norm has one).
_backward_op = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, Tensor? dsum, "
    "bool need_dweight) -> (Tensor, Tensor)",
    _backward_fake,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float, backend: str) -> Tensor:
        return implementation("rms_norm", backend).forward(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        if recording_backward():
            grads = differentiate(lambda x, w: _reference(x, w, ctx.eps), (x, weight), (dy,))
            return *grads, None, None
        backward = implementation("rms_norm", ctx.backend).backward
        assert backward is not None
        need_dweight = weight is not None and ctx.needs_input_grad[1]
        dx, dweight = backward(dy, x, weight, ctx.eps, None, need_dweight)
        return dx, dweight if need_dweight else None, None, None


def unsupported_by_norm_kernels(
    x: Tensor, weight: Tensor | None, *others: Tensor | None
) -> str | None:
    """Why the C++ kernels of rms_norm and add_rms_norm cannot take these tensors, or None."""
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return f"weight is {weight.dtype}; the kernel takes x's dtype {x.dtype} or float32"
    return unsupported_by_cpu_kernels(x, weight, *others)


def _cpu_forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _forward_op(with_unit_last_stride(x), _contiguous(weight), eps)


def cpu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dsum: Tensor | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """The C++ backward of rms_norm; with ``dsum``, of add_rms_norm."""
    return _backward_op(
        with_unit_last_stride(dy),
        with_unit_last_stride(x),
        _contiguous(weight),
        eps,
        None if dsum is None else with_unit_last_stride(dsum),
        need_dweight,
    )


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


OP = register_op(
    Op(
        name="rms_norm",
        public=rms_norm,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("x", "weight"),
    )
)

register(
    "rms_norm",
    "cpu",
    ("cpu",),
    _cpu_forward,
    cpu_backward,
    lambda x, weight, eps: unsupported_by_norm_kernels(x, weight),
)
