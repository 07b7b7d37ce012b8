"""A linear layer whose matrix is stored in 8 or 4 bits per number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops._autograd import apply, recording_backward
from lmfast.ops._library import (
    accumulation_dtype,
    check_same_device,
    check_tensor,
    define,
    needs_grad,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.ops._rounding import quantise_groups, quantise_rows
from lmfast.testing import Sample

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def quantise_weight(weight: Tensor, bits: int = 8, *, group: int = 32) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to 8 or 4 bits per number, for ``quantised_linear``.

    8 bits: one scale per row, the largest magnitude at 127. 4 bits: one scale per ``group`` numbers
    of a row, the one of eight candidates with the least squared error.

    Args:
        weight: (N, K), a floating-point tensor.
        bits: 8 or 4.
        group: numbers that share a scale at 4 bits; even, and K a multiple of it.

    Returns:
        (codes, scales): int8 (N, K) and float32 (N,), or uint8 (N, K / 2) and float16
        (N, K / group).

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: ``bits`` or ``group`` do not fit.

    Backends:
        torch.

    Source:
        Round to nearest with a scale per row: Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339.

    Example:
        >>> import lmfast, torch
        >>> codes, scales = lmfast.ops.quantise_weight(torch.tensor([[1.27, -0.64]]))
        >>> codes.tolist()
        [[127, -64]]
    """
    if check_tensor("weight", weight).dim() != 2:
        raise ValueError(f"weight must be (N, K), got {tuple(weight.shape)}")
    if bits == 8:
        quantised = quantise_rows(weight)
        return quantised.codes, quantised.scales
    if bits != 4:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if group < 2 or group % 2 or weight.shape[1] % group:
        raise ValueError(
            f"group must be even and divide the {weight.shape[1]} columns of weight, got {group}"
        )
    quantised = quantise_groups(weight, group)
    shifted = (quantised.codes + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4), quantised.scales


def quantised_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiplies by a matrix that is stored in 8 or 4 bits per number.

    ``y = x W^T + bias`` with ``W = scale * code``. At few rows the time is reading W: half or a
    quarter of bf16's. Sums are kept in fp32.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        codes: int8 (N, K), or uint8 (N, K / 2): byte j of a row holds number 2 j, plus 8, in its
            low half and number 2 j + 1 in its high one.
        scales: of int8 (N,), one per row; of 4 bits (N, G), one per K / G numbers of a row. Any
            floating-point dtype. ``quantise_weight`` makes both.
        bias: (N,) or None, x's dtype.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (..., N) in x's dtype.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that do not fit or devices that differ.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++, not float64, up to 256 rows), triton (chosen up to 1024 rows), and torch, which
        also computes the gradient of scales. Gradients of x on the CPU by PyTorch's product,
        gradients of gradients through PyTorch.

    Source:
        Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339 (a scale per row); Frantar et al. 2022,
        GPTQ, arXiv:2210.17323 (groups, weights widened in registers).

    Example:
        >>> import lmfast, torch
        >>> weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
        >>> codes, scales = lmfast.ops.quantise_weight(weight)
        >>> lmfast.ops.quantised_linear(torch.tensor([[1.0, 1.0]]), codes, scales).round(decimals=1)
        tensor([[-1.0000,  4.5000]])
    """
    args = _check(x, codes, scales, bias)
    chosen = select(OP, args, backend)
    # On a GPU also PyTorch's product widens the matrix anew for the gradient and keeps none.
    own = chosen.backend != "torch" or (x.is_cuda and not needs_grad(scales))
    if own and needs_grad(x, bias):
        return apply(_QuantisedLinear, *args, chosen.backend)
    return chosen.forward(*args)


def _check(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    check_tensor("x", x)
    if not isinstance(codes, Tensor) or codes.dtype not in (torch.int8, torch.uint8):
        kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"codes must be int8 or, at 4 bits, uint8, got {kind}")
    check_tensor("scales", scales)
    if scales.dtype not in SCALE_DTYPES:
        raise TypeError(
            f"scales must be a floating-point tensor of 16 bits or more, got {scales.dtype}"
        )
    if x.dim() == 0 or codes.dim() != 2:
        raise ValueError(
            f"x must be (..., K) and codes (N, ...), got {tuple(x.shape)} and {tuple(codes.shape)}"
        )
    depth, four = x.shape[-1], codes.dtype == torch.uint8
    if codes.shape[1] * (2 if four else 1) != depth:
        wanted = "(N, K / 2)" if four else "(N, K)"
        raise ValueError(
            f"codes must be {wanted} with the K of x (..., K), "
            f"got {tuple(codes.shape)} for x {tuple(x.shape)}"
        )
    rows = codes.shape[0]
    if four:
        groups = scales.shape[1] if scales.dim() == 2 else 0
        fits = scales.dim() == 2 and scales.shape[0] == rows
        if not fits or (depth and (groups == 0 or depth % groups or depth // groups % 2)):
            raise ValueError(
                f"scales must be ({rows}, G) with K / G even for K = {depth}, "
                f"got {tuple(scales.shape)}"
            )
    elif scales.shape != (rows,):
        raise ValueError(f"scales must have shape ({rows},), got {tuple(scales.shape)}")
    for name, t in (("codes", codes), ("scales", scales), ("bias", bias)):
        if t is not None:
            check_same_device(name, t, "x", x)
    if bias is not None:
        if check_tensor("bias", bias).shape != (rows,):
            raise ValueError(f"bias must have shape ({rows},), got {tuple(bias.shape)}")
        if bias.dtype != x.dtype:
            raise TypeError(f"bias must have x's dtype {x.dtype}, got {bias.dtype}")
    return x, codes, scales, bias


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) scale * code in ``dtype``."""
    if codes.dtype == torch.int8:
        return codes.to(dtype) * scales[:, None].to(dtype)
    high = torch.bitwise_right_shift(codes, 4)  # of a DTensor, torch 2.13's >> shifts nothing
    numbers = torch.stack((codes & 15, high), -1).flatten(1).to(dtype) - 8
    per_row = scales.shape[1]
    groups = numbers.view(codes.shape[0], per_row, numbers.shape[1] // per_row)
    return (groups * scales[..., None].to(dtype)).flatten(1)


def _reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    weight = dequantised(codes, scales, wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def _peer(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantised(codes, scales, x.dtype), bias)


def _fake(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


# For kernels; the reference needs no operators.
_kernel = define(
    "quantised_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor", _fake
)
define(
    "quantised_linear_backward(Tensor dy, Tensor codes, Tensor scales) -> Tensor",
    lambda dy, codes, scales: dy.new_empty(
        (*dy.shape[:-1], codes.shape[1] * (1 if codes.dtype == torch.int8 else 2))
    ),
)


class _QuantisedLinear(torch.autograd.Function):
    """The gradients of x and bias by kernels; the matrix has none."""

    @staticmethod
    def forward(
        x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, backend: str
    ) -> Tensor:
        return implementation("quantised_linear", backend).forward(x, codes, scales, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes, scales, _, ctx.backend = inputs
        ctx.save_for_backward(codes, scales)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        codes, scales = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            backward = implementation("quantised_linear", ctx.backend).backward or _backward
            # The layer is linear in x: gradients of gradients are those of the plain product.
            dx = (_backward if recording_backward() else backward)(dy, codes, scales)
        if ctx.needs_input_grad[3]:
            dbias = dy.sum_to_size(dy.shape[-1])
        return dx, None, None, dbias, None


# Up to how many rows the codes are multiplied as they lie; beyond, widening the whole matrix for
# PyTorch's product costs less. Measured.
_MOST_ROWS = 256
# The same on a GPU, estimated: widening moves 13 bytes per number, on a Hopper 4e-12 s, and what
# cuBLAS is faster by, 400 Tflop/s or so, is 2.5e-15 s per number and row.
_MOST_GPU_ROWS = 1024


def _forward(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return _kernel(x, with_unit_last_stride(codes), scales.contiguous(), bias)


def _widened(codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """The matrix that PyTorch multiplies with: sums are kept in fp32 on a GPU in any dtype."""
    wide = accumulation_dtype(like.dtype)
    return dequantised(codes, scales, wide).to(like.dtype if like.is_cuda else wide)


def _by_library(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_cuda:
        return _reference(x, codes, scales, bias)
    return F.linear(x, _widened(codes, scales, x), bias).to(x.dtype)  # autocast chooses its own


def _backward(dy: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The gradient of x, by PyTorch's product of the widened matrix."""
    weight = _widened(codes, scales, dy)
    return (dy.to(weight.dtype) @ weight).to(dy.dtype)


def _prefer(x: Tensor, *rest: Any) -> tuple[str, str] | None:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.is_cuda and rows > _MOST_GPU_ROWS:
        return "torch", f"{rows} rows: above {_MOST_GPU_ROWS} cuBLAS's product is faster"
    return None


def _unsupported(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> str | None:
    if needs_grad(scales):
        return "no kernel for the gradient of scales"
    for t in (x, scales):
        if t.dtype == torch.float64:
            return "no kernel for torch.float64"
    if x.numel() > _MOST_ROWS * x.shape[-1]:
        return f"PyTorch's product of the widened matrix is faster for more than {_MOST_ROWS} rows"
    return unsupported_by_cpu_kernels(x, scales, bias)


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for rows, n, k in ((1, 70, 96), (3, 40, 130), (20, 33, 64)):
        codes, scales = quantise_weight(normal(n, k) / k**0.5)
        yield Sample(f"int8 {rows}x{k}x{n}", (normal(rows, k).to(dtype), codes, scales))
    for rows, n, k, group in ((1, 70, 96, 32), (3, 40, 128, 16), (20, 33, 140, 70)):
        codes, scales = quantise_weight(normal(n, k) / k**0.5, 4, group=group)
        bias = normal(n).to(dtype)
        x = normal(rows, k).to(dtype)
        yield Sample(f"int4 {rows}x{k}x{n} groups of {group}", (x, codes, scales, bias))
    codes, scales = quantise_weight(normal(19, 5000) / 70)
    yield Sample("int8 deep", (normal(2, 5000).to(dtype), codes, scales.half()))
    # More than a page to a row, more groups than are widened at a time, and an uneven rest.
    codes, scales = quantise_weight(normal(21, 9520) / 97, 4, group=56)
    yield Sample("int4 deep", (normal(2, 9520).to(dtype), codes, scales.bfloat16()))
    codes, scales = quantise_weight(normal(37, 72) / 8, 4, group=2)
    yield Sample("int4 groups of 2", (normal(50, 72).to(dtype), codes, scales.half()))
    codes, scales = quantise_weight(normal(40, 64) / 8)
    yield Sample("int8 codes apart", (normal(5, 33).to(dtype), codes[:, 3:36], scales))
    codes, scales = quantise_weight(normal(24, 40) / 6)
    x = normal(2, 40, 3).to(dtype).transpose(1, 2)
    yield Sample("strided", (x, codes, scales, normal(24).to(dtype)))
    yield Sample("no rows", (normal(0, 40).to(dtype), codes, scales))


OP = register_op(
    Op(
        name="quantised_linear",
        public=quantised_linear,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("x", "bias"),
        peer=_peer,
        prefer=_prefer,
    ),
    _by_library,
)

register("quantised_linear", "cpu", ("cpu",), _forward, _backward, _unsupported)
