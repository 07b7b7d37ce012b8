"""A linear layer with bias and ReLU: few rows at the speed of memory, many on bf16 tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast._dispatch import (
    Op,
    implementation,
    register,
    register_op,
    select,
)
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    REFUSALS,
    check_same_device,
    check_tensor,
    define,
    is_autocast,
    may_run_at_once,
    needs_grad,
    on_cpu,
)
from lmfast.ops._linear_cpu import backward, few_rows, forward, linear_of_few_rows, unsupported
from lmfast.ops._precision import bf16_products_allowed
from lmfast.testing import Sample


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Multiplies by a matrix, adds a bias and, if asked for, clips at zero.

    ``y = x weight^T + bias``, or ``max(y, 0)``; as ``torch.nn.functional.linear``.

    fp32 is multiplied in fp32's accuracy, as exact sums of bf16 numbers; infinite numbers then give
    NaN. Where ``torch.set_float32_matmul_precision("medium")`` allows it, factors are rounded to
    bf16 once and summed in fp32.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        weight: (N, K), x's dtype; any strides: the transpose of a (K, N) matrix costs nothing.
        bias: (N,) or None.
        relu: clip negative results to zero.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (..., N) in x's dtype, under autocast in autocast's.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ without autocast.
        ValueError: shapes that do not fit or devices that differ.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++; few rows, as when a model generates: up to 32, in bfloat16 up to 8; float32 from
        256 rows on, on processors with AMX or, in medium precision, AVX512-BF16), torch, and triton
        when asked for: on a GPU cuBLAS's product is taken. Gradients on all; gradients of gradients
        through PyTorch.

    Source:
        Splitting floats into bf16 parts: Henry, Tang and Heinecke 2019, arXiv:1904.06376.

    Example:
        >>> import lmfast, torch
        >>> lmfast.ops.linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]]), relu=True)
        tensor([[0.]])
    """
    if may_run_at_once("linear", backend):
        try:
            if _is_for_few_rows(x, weight, bias):
                return linear_of_few_rows(x, weight, bias, bool(relu))
        except REFUSALS:
            pass
    args = _check(x, weight, bias, relu=relu)
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _reference(*args)
    if needs_grad(x, weight, bias):
        return apply(_Linear, *args, chosen.backend)
    return chosen.forward(*args)


_TENSORS = (Tensor, torch.nn.Parameter)


def _is_for_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operator for few rows, which has checks of its own, is to be tried."""
    return (
        type(x) in _TENSORS
        and type(weight) in _TENSORS
        and few_rows(x, weight)
        and on_cpu(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and not needs_grad(x, weight, bias)
    )


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False
) -> tuple[Any, ...]:
    check_tensor("x", x)
    check_tensor("weight", weight)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "weight must be (N, K) with the K of x (..., K), "
            f"got {tuple(weight.shape)} for x {tuple(x.shape)}"
        )
    check_same_device("weight", weight, "x", x)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
        check_same_device("bias", bias, "x", x)
    if not is_autocast(x):
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
    return x, weight, bias, bool(relu), bf16_products_allowed()


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounded: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    # relu_ overwrites the product just made: no second tensor is allocated.
    return y.relu_() if relu else y


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def wide(n: int, k: int) -> Tensor:
        return (torch.randn(n, k, generator=generator, device=device) / k**0.5).to(dtype)

    yield Sample("257x65x70", (normal(257, 65), wide(70, 65), normal(70)))
    yield Sample("relu", (normal(5, 67, 64), wide(64, 96).t(), normal(96)), {"relu": True})
    yield Sample("deep", (normal(300, 2100), wide(64, 2100)))
    yield Sample("rows apart", (normal(290, 2, 72)[:, 1], wide(66, 72), normal(66)))
    yield Sample("one row", (normal(515), wide(83, 515), normal(83)), {"relu": True})
    yield Sample("one row of columns", (normal(1, 131), wide(131, 2100).t()[:2083], normal(2083)))
    yield Sample("8 rows of columns", (normal(8, 301), wide(301, 150).t(), normal(150)))
    yield Sample("32 rows", (normal(32, 2, 270)[:, 0], wide(77, 300)[:, :270]))


# For kernels other than the CPU's, which has one for its own form of the product.
define(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool relu, Tensor? a, Tensor? b, float scale) "
    "-> Tensor",
    lambda x, weight, *rest: x.new_empty((x.shape[0], weight.shape[0])),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        relu: bool,
        rounded: bool,
        backend: str,
    ) -> Tensor:
        return implementation("linear", backend).forward(x, weight, bias, relu, rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.relu, ctx.rounded, ctx.backend = inputs
        ctx.save_for_backward(x, weight, bias, output if ctx.relu else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, output = ctx.saved_tensors
        if recording_backward():

            def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return _reference(x, weight, bias, ctx.relu, ctx.rounded)

            grads = differentiate(plain, (x, weight, bias), (dy,))
            return *grads, None, None, None
        if ctx.relu:
            dy = torch.ops.aten.threshold_backward(dy, output, 0)
        backward = implementation("linear", ctx.backend).backward
        assert backward is not None
        grads = backward(dy, x, weight, bias, ctx.rounded, ctx.needs_input_grad[:3])
        return *grads, None, None, None


def library_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: bool,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients by PyTorch's products."""
    rows, flat = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (rows @ weight).view(x.shape) if wanted[0] else None
    dweight = rows.t() @ flat if wanted[1] else None
    dbias = rows.sum(0) if bias is not None and wanted[2] else None
    return [dx, dweight, dbias]


def _prefer(x: Tensor, *rest: Any) -> tuple[str, str] | None:
    if x.is_cuda:
        return "torch", "cuBLAS's product is faster"
    return None


OP = register_op(
    Op(
        name="linear",
        public=linear,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("x", "weight", "bias"),
        prefer=_prefer,
    )
)

register("linear", "cpu", ("cpu",), forward, backward, unsupported)
