"""A linear layer with a low-rank update beside its matrix (LoRA), in few passes both ways.

Eager PyTorch adds the update in three more passes over the output and, going back, two more over
the gradient of the input. Here the second factor's product is added where the output lies, and in
the backward pass the first factor's where the gradient lies; beside x only x A, of R columns, is
kept. The matrix itself is usually frozen and then costs one product forward and one backward. On
the CPU a kernel does the rest, the update and the gradients of its factors (csrc/cpu/kernels).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast._transforms import transform_of
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    accumulation_dtype,
    check_same_device,
    check_tensor,
    define,
    is_autocast,
    needs_grad,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.ops.linear import linear
from lmfast.testing import Sample

# On a GPU; above, the matrix is no longer what takes the time.
_MOST_FUSED_ROWS = 64
# Ranks of the CPU's kernel. Above, PyTorch's products of the factors are faster, which are slow for
# few columns, in fp32 more than in bf16. Measured, forward and backward.
_MOST_CPU_RANK, _MOST_BF16_RANK = 16, 8


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    low: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiplies by a matrix and by a low-rank update of it.

    ``y = x weight^T + bias + scale (x a) b``

    Args:
        x: (..., K), a floating-point tensor.
        weight: (N, K), any strides.
        a: (K, R); b: (R, N): the factors of the update, R small.
        bias: (N,) or None.
        scale: of the update, alpha / R by custom.
        low: (..., K): what the update is applied to in the place of x, for instance x with some
            features dropped.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (..., N) in x's dtype, under autocast in autocast's.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ without autocast.
        ValueError: shapes that do not fit or devices that differ.
        BackendError: the backend asked for cannot run this call.

    Backends:
        torch and cpu, whose large products are those of ``lmfast.ops.linear`` (cpu for ranks to
        16, in bf16 to 8, above which PyTorch's products of the factors are faster); triton (ranks
        to 128; taken by itself up to 64 rows, where the matrix is what takes the time).

    Source:
        Hu et al. 2021, LoRA, arXiv:2106.09685.

    Example:
        >>> import lmfast, torch
        >>> x, weight = torch.ones(1, 3), torch.eye(3)
        >>> lmfast.ops.lora_linear(x, weight, torch.ones(3, 1), torch.ones(1, 3), scale=0.5)
        tensor([[2.5000, 2.5000, 2.5000]])
    """
    args = _check(x, weight, a, b, bias=bias, scale=scale, low=low)
    chosen = select(OP, args, backend)
    if chosen.backend not in ("torch", "cpu"):
        if needs_grad(x, weight, a, b, bias):
            return apply(_LoRALinear, *args, chosen.backend)[0]
        return chosen.forward(*args)
    if transform_of(*args):
        return _reference(*args)
    if is_autocast(x):
        if any(t is not None and t.dtype == torch.float64 for t in (x, weight, a, b, bias, low)):
            return _reference(*args)  # autocast leaves fp64 alone
        args = _in_autocast_dtype(*args)
    if needs_grad(x, weight, a, b, bias, low):
        return apply(_LoRALinear, *args, chosen.backend)[0]
    return _products(*args, backend=chosen.backend)[0]


def _check(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    low: Tensor | None = None,
) -> tuple[Any, ...]:
    given = {"x": x, "weight": weight, "a": a, "b": b}
    given |= {name: t for name, t in (("bias", bias), ("low", low)) if t is not None}
    for name, tensor in given.items():
        check_tensor(name, tensor)
        check_same_device(name, tensor, "x", x)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "weight must be (N, K) with the K of x (..., K), "
            f"got {tuple(weight.shape)} for x {tuple(x.shape)}"
        )
    rows, columns = weight.shape
    if a.dim() != 2 or a.shape[0] != columns:
        raise ValueError(f"a must be (K, R) with K = {columns}, got {tuple(a.shape)}")
    if b.shape != (a.shape[1], rows):
        raise ValueError(f"b must be (R, N) = {(a.shape[1], rows)}, got {tuple(b.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias must have shape ({rows},), got {tuple(bias.shape)}")
    if low is not None and low.shape != x.shape:
        raise ValueError(f"low must have x's shape {tuple(x.shape)}, got {tuple(low.shape)}")
    if not is_autocast(x):
        for name, tensor in given.items():
            if tensor.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    return x, weight, a, b, bias, float(scale), low


def _in_autocast_dtype(*args: Any) -> tuple[Any, ...]:
    """The arguments, tensors in the dtype of autocast's products; gradients go back through it."""
    dtype = torch.get_autocast_dtype(args[0].device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in args)


def _reference(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    low: Tensor | None,
) -> Tensor:
    update = (x if low is None else low) @ a @ b
    return torch.nn.functional.linear(x, weight, bias) + scale * update


def _matrix(t: Tensor) -> Tensor:
    """(..., K) as (rows, K), whatever is zero."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def _products(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    low: Tensor | None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output and (x a), as (rows, R)."""
    source = _matrix(x if low is None else low)
    y = linear(x, weight, bias)
    rows = y.view(source.shape[0], y.shape[-1])
    if backend == "cpu":
        return y, _update(rows, with_unit_last_stride(source), a, b, scale)
    inner = source @ a
    rows.addmm_(inner, b, alpha=scale)
    return y, inner


def _forward_cpu(*args: Any) -> Any:
    return _products(*args, backend="cpu")[0]


_update = define(
    "lora_update_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scale) -> Tensor",
    lambda y, x, a, b, scale: x.new_empty(
        (x.shape[0], b.shape[0]), dtype=accumulation_dtype(x.dtype)
    ),
)
_update_backward = define(
    "lora_update_backward_(Tensor(a!)? dx, Tensor dy, Tensor x, Tensor inner, Tensor a, Tensor b, "
    "float scale) -> (Tensor, Tensor)",
    lambda dx, dy, x, inner, a, b, scale: (a.new_empty(a.shape), b.new_empty(b.shape)),
)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        low: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        if backend in ("torch", "cpu"):
            return _products(x, weight, a, b, bias, scale, low, backend=backend)
        forward = implementation("lora_linear", backend).forward
        y = forward(x, weight, a, b, bias, scale, low)
        return y, _matrix(x) @ a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, a, b, bias, ctx.scale, low, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, a, b, bias, low, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
        x, weight, a, b, bias, low, inner = ctx.saved_tensors
        if dy is None:
            return (None,) * 8
        if recording_backward():

            def plain(x, weight, a, b, bias, low):  # type: ignore[no-untyped-def]
                return _reference(x, weight, a, b, bias, ctx.scale, low)

            *grads, dlow = differentiate(plain, (x, weight, a, b, bias, low), (dy,))
            return *grads, None, dlow, None
        wanted = ctx.needs_input_grad
        rows = _matrix(dy)
        source = _matrix(x if low is None else low)
        dx = dweight = da = db = dbias = dlow = None
        if wanted[1]:
            dweight = rows.t() @ _matrix(x)
        if bias is not None and wanted[4]:
            dbias = rows.sum(0)
        if ctx.backend == "cpu":
            if wanted[0]:
                dx = linear(rows, weight.t())
            if low is not None and wanted[6]:
                dlow = source.new_zeros(source.shape)
            da, db = _update_backward(
                dx if low is None else dlow,
                with_unit_last_stride(rows),
                with_unit_last_stride(source),
                inner,
                a,
                b,
                ctx.scale,
            )
            dx, dlow = (None if t is None else t.view(x.shape) for t in (dx, dlow))
            return dx, dweight, da, db, dbias, None, dlow, None
        if wanted[0] and ctx.backend != "torch":
            # dy weight + scale (dy b^T) a^T has the form of the forward.
            forward = implementation("lora_linear", ctx.backend).forward
            dx = forward(rows, weight.t(), b.t(), a.t(), None, ctx.scale, None).view(x.shape)
        dinner = (rows @ b.t()).mul_(ctx.scale)  # (rows, R)
        if wanted[0] and dx is None:
            dx = linear(rows, weight.t())
            if low is None:
                dx.addmm_(dinner, a.t())
            dx = dx.view(x.shape)
        if wanted[2]:
            da = source.t() @ dinner
        if wanted[3]:
            db = (inner.t() @ rows).mul_(ctx.scale)
        if low is not None and wanted[6]:
            dlow = (dinner @ a.t()).view(x.shape)
        return dx, dweight, da, db, dbias, None, dlow, None


def _unsupported(*args: Any) -> str | None:
    tensors = [t for t in args if isinstance(t, Tensor)]
    x, _, a = tensors[:3]
    dtype = torch.get_autocast_dtype("cpu") if is_autocast(x) else x.dtype
    most = _MOST_BF16_RANK if dtype == torch.bfloat16 else _MOST_CPU_RANK
    if a.shape[1] > most:
        return f"above rank {most} in {dtype} PyTorch's products of the factors are faster"
    if any(hasattr(t, "placements") for t in tensors):
        return "no kernel for DTensors"
    return unsupported_by_cpu_kernels(*tensors)


def _prefer(x: Tensor, *rest: Any) -> tuple[str, str] | None:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.is_cuda and rows > _MOST_FUSED_ROWS:
        return "torch", f"{rows} rows: above {_MOST_FUSED_ROWS} cuBLAS's products are faster"
    return None


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def narrow(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) / 4).to(dtype)

    yield Sample("3x5x7 R 2", (normal(3, 5), narrow(7, 5), narrow(5, 2), narrow(2, 7)))
    yield Sample(
        "bias, dropped input",
        (normal(2, 3, 4), narrow(6, 4), narrow(4, 1), narrow(1, 6)),
        {"bias": normal(6), "scale": 2.0, "low": normal(2, 3, 4)},
    )
    yield Sample(
        "77x83x61 R 7",
        (normal(77, 83), narrow(61, 83), narrow(83, 7), narrow(7, 61)),
        {"scale": -0.5},
    )
    yield Sample("130x80x97 R 8", (normal(130, 80), narrow(97, 80), narrow(80, 8), narrow(8, 97)))
    yield Sample(
        "280x96x80 R 16",
        (normal(280, 96), narrow(96, 80).t(), narrow(96, 16), narrow(16, 80)),
        {"bias": normal(80), "scale": 0.5},
    )
    yield Sample("no rows", (normal(0, 4), narrow(6, 4), narrow(4, 2), narrow(2, 6)))


OP = register_op(
    Op(
        name="lora_linear",
        public=lora_linear,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("x", "weight", "a", "b", "bias", "low"),
        prefer=_prefer,
    )
)

register("lora_linear", "cpu", ("cpu",), _forward_cpu, _update_backward, _unsupported)
