"""A linear layer with bias and ReLU: fp32 on bf16 tiles, in full or medium precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast import _extension
from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    check_same_device,
    check_tensor,
    define,
    needs_grad,
    unsupported_by_cpu_kernels,
)
from lmfast.ops._linear_cross_entropy_arguments import bf16_products_allowed
from lmfast.testing import Sample

# Below, PyTorch's product is as fast.
_FEWEST_ROWS, _LEAST_WIDTH = 256, 64


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
        cpu (C++; float32 from 256 rows on, on processors with AMX or, in medium precision,
        AVX512-BF16), torch. Gradients on both; gradients of gradients through PyTorch.

    Source:
        Splitting floats into bf16 parts: Henry, Tang and Heinecke 2019, arXiv:1904.06376.

    Example:
        >>> import lmfast, torch
        >>> lmfast.ops.linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]]), relu=True)
        tensor([[0.]])
    """
    args = _check(x, weight, bias, relu=relu)
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _reference(*args)
    if needs_grad(x, weight, bias):
        return apply(_Linear, *args, chosen.backend)
    return chosen.forward(*args)


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
    if not torch.is_autocast_enabled(x.device.type):
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


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, parts: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_product = define(
    "linear_amx(Tensor x, Tensor weight, Tensor? bias, bool relu, int parts) -> Tensor",
    _fake,
)


def _matrix(t: Tensor) -> Tensor:
    """``t`` if its rows or its columns are contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.stride(0) == 1 else t.contiguous()


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


def _parts(rounded: bool) -> int:
    return 1 if rounded else 3


def fp32_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias for fp32 matrices on the CPU, by whichever product is faster; no autograd.

    For operators whose backward is made of whole products: `linear` without its checks and its
    choice of backend.
    """
    rounded = bf16_products_allowed()
    if a.dtype == torch.float32 and _has_tiles(rounded) and _is_faster(a.shape[0], b.shape):
        bias = None if bias is None else bias.contiguous()
        return _product(_matrix(a), _matrix(b), bias, False, _parts(rounded))
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


def _cpu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounded: bool
) -> Tensor:
    rows = _matrix(x.reshape(-1, x.shape[-1]))
    bias = None if bias is None else bias.contiguous()
    y = _product(rows, _matrix(weight), bias, relu, _parts(rounded))
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))


def _cpu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: bool,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    rows, flat = _matrix(dy.reshape(-1, dy.shape[-1])), _matrix(x.reshape(-1, x.shape[-1]))
    parts = _parts(rounded)
    dx = dweight = dbias = None
    if wanted[0]:
        dx = _product(rows, _matrix(weight).t(), None, False, parts).view(x.shape)
    if wanted[1]:
        # In the layout of the weight, so that nobody has to transpose it.
        if weight.stride(-1) == 1:
            dweight = _product(rows.t(), flat.t(), None, False, parts)
        else:
            dweight = _product(flat.t(), rows.t(), None, False, parts).t()
    if bias is not None and wanted[2]:
        dbias = rows.sum(0)
    return [dx, dweight, dbias]


def _tile_precision() -> str | None:
    """The precision in which there are tiles: "highest" and below, "medium" alone, or none."""
    if _extension.cpu_isa() == "amx":
        return "highest"
    return "medium" if _extension.has_bf16_tiles() else None


# What torch.compiler.assume_constant_result sets: a compiled graph keeps the answer.
_tile_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_tiles(rounded: bool) -> bool:
    precision = _tile_precision()
    return precision == "highest" or (rounded and precision == "medium")


def _is_faster(rows: int, weight: Sequence[int]) -> bool:
    return rows >= _FEWEST_ROWS and min(weight) >= _LEAST_WIDTH


def _unsupported_by_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounded: bool
) -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "PyTorch's product is as fast under autocast"
    if x.dtype != torch.float32:
        return f"PyTorch's product is as fast for {x.dtype}"
    if _extension.cpu.loaded and not _has_tiles(rounded):
        return f"needs AMX{' or AVX512-BF16' if rounded else ''}"
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not _is_faster(rows, weight.shape):
        return (
            f"PyTorch's product is as fast below {_FEWEST_ROWS} rows and widths of {_LEAST_WIDTH}"
        )
    return unsupported_by_cpu_kernels(x, weight, bias)


OP = register_op(
    Op(
        name="linear",
        public=linear,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("x", "weight", "bias"),
    )
)

register("linear", "cpu", ("cpu",), _cpu_forward, _cpu_backward, _unsupported_by_cpu)
