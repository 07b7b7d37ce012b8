"""Rotary position embedding of queries and keys, forward, backward and in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast._transforms import in_transform, transform_of
from lmfast.ops._autograd import apply
from lmfast.ops._library import (
    check_same_device,
    check_tensor,
    define,
    needs_grad,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.ops._rotation import angles, check_positions, check_tables, rotate
from lmfast.ops.rope_tables import rope_tables
from lmfast.testing import Sample


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = True,
    positions: int | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of dimensions of q and k by an angle that grows with the position.

    ``(a, b) -> (a cos - b sin, a sin + b cos)`` for each pair of the first ``2 * cos.shape[1]``
    dimensions; the others pass through. Computed in fp32 (fp64 for fp64 input).

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 or float64; any strides. A (B, T, H, D)
            projection seen through ``transpose(1, 2)`` is read in place.
        k: (B, Hkv, T, D), q's dtype.
        cos, sin: (L, D_rot / 2) from ``rope_tables``, float32 (or float64 with float64 q).
        interleaved: pairs are neighbours (2p, 2p+1); False: halves (p, p + D_rot/2), the
            layout of Llama weights.
        positions: None: token t is at position t. An int or a (B,) tensor: the position of the
            first token. (B, T): of every token. Integer tensors on q's device.
        inplace: overwrite q and k and return them. For inference: not differentiable.
        backend: overrides the choice of implementation.

    Returns:
        (q, k) rotated, with the shapes, dtype and memory layout of the arguments.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, an odd head size smaller than the tables, positions
            past the tables (on a GPU such rows become NaN instead), ``inplace`` with gradients or
            with tensors whose parts overlap.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), cuda (C++), triton, torch. Gradients of any order on all; none for the tables.

    Source:
        Su et al., RoFormer, 2021, arXiv:2104.09864.

    Example:
        >>> import lmfast, torch
        >>> cos, sin = lmfast.ops.rope_tables(16, 8)
        >>> q, k = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
        >>> q, k = lmfast.ops.rope(q, k, cos, sin, positions=5)
    """
    args = _check(q, k, cos, sin, interleaved=interleaved, positions=positions, inplace=inplace)
    chosen = select(OP, args, backend)
    if needs_grad(q, k) and chosen.backend != "torch":
        return apply(_Rope, *args[:7], chosen.backend, False)
    return chosen.forward(*args)


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = True,
    positions: int | Tensor | None = None,
    inplace: bool = False,
) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_tensor(name, t)
        check_same_device(name, t, "q", q)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"q and k must have 4 dimensions (B, H, T, D), got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype {q.dtype}, got {k.dtype}")
    if (k.shape[0], k.shape[2], k.shape[3]) != (q.shape[0], q.shape[2], q.shape[3]):
        raise ValueError(
            f"k must agree with q in B, T and D, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    table = check_tables(cos, sin, q)
    if inplace and needs_grad(q, k):
        raise ValueError("inplace=True is for inference: q or k requires a gradient")
    if inplace and not torch.compiler.is_compiling():
        for name, t in (("q", q), ("k", k)):
            if any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape)):
                raise ValueError(f"{name} is expanded: with inplace=True its parts overlap")
        if k is q or _begin_together(q, k):
            raise ValueError("k must not be q with inplace=True: it would be rotated twice")
    starts, offset = check_positions(positions, q, cos.shape[0])
    return q, k, cos.to(table), sin.to(table), starts, offset, bool(interleaved), bool(inplace)


def _begin_together(q: Tensor, k: Tensor) -> bool:
    if type(q) is not Tensor or type(k) is not Tensor or in_transform() or q.is_meta:
        return False  # they need not have memory
    return q.numel() > 0 and q.data_ptr() == k.data_ptr()


def _reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    c, s = angles(cos, sin, positions, offset, q.shape[2])
    rotated = rotate(q, c, s, interleaved), rotate(k, c, s, interleaved)
    if inplace:
        return q.copy_(rotated[0]), k.copy_(rotated[1])
    return rotated


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def tables(length: int, rotary: int) -> tuple[Tensor, Tensor]:
        return rope_tables(length, rotary, device=device)

    for interleaved in (True, False):
        name = "interleaved" if interleaved else "half"
        for b, h, hkv, t, d in (
            (2, 3, 3, 5, 16),
            (1, 4, 1, 1, 64),
            (2, 2, 1, 7, 6),
            (1, 1, 1, 3, 34),
        ):
            yield Sample(
                f"{name} {b}x{h}x{t}x{d}",
                (normal(b, h, t, d), normal(b, hkv, t, d), *tables(t, d)),
                {"interleaved": interleaved},
            )
        yield Sample(
            f"{name} partial",
            (normal(2, 2, 3, 24), normal(2, 1, 3, 24), *tables(9, 10)),
            {"interleaved": interleaved, "positions": 6},
        )
        yield Sample(
            f"{name} heads last",
            (normal(2, 5, 3, 8).transpose(1, 2), normal(2, 5, 2, 8).transpose(1, 2), *tables(5, 8)),
            {"interleaved": interleaved},
        )
        yield Sample(
            f"{name} positions per row",
            (normal(2, 2, 3, 8), normal(2, 1, 3, 8), *tables(40, 8)),
            {"interleaved": interleaved, "positions": torch.tensor([37, 0], device=device)},
        )
        yield Sample(
            f"{name} positions per token",
            (normal(2, 2, 3, 8), normal(2, 1, 3, 8), *tables(40, 8)),
            {
                "interleaved": interleaved,
                "positions": torch.tensor([[0, 39, 1], [5, 5, 2]], device=device),
            },
        )
        yield Sample(
            f"{name} empty",
            (normal(0, 2, 3, 8), normal(0, 1, 3, 8), *tables(3, 8)),
            {"interleaved": interleaved},
        )


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _inplace_fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
) -> None:
    return None


_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved"
_op = define(f"rope(Tensor q, Tensor k, {_ARGUMENTS}, bool inverse) -> (Tensor, Tensor)", _fake)
_inplace_op = define(f"rope_(Tensor(a!) q, Tensor(b!) k, {_ARGUMENTS}) -> ()", _inplace_fake)


class _Rope(torch.autograd.Function):
    """A rotation; its backward is the inverse rotation, through this same class."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        offset: int,
        interleaved: bool,
        backend: str,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        rotate = implementation("rope", backend).backward
        assert rotate is not None
        return rotate(q, k, cos, sin, positions, offset, interleaved, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, cos, sin, positions, ctx.offset, ctx.interleaved, ctx.backend, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
        settings = (*ctx.saved_tensors, ctx.offset, ctx.interleaved, ctx.backend, not ctx.inverse)
        if transform_of(dq, dk):
            cos, sin, positions, offset, interleaved = settings[:5]
            sin = sin if ctx.inverse else -sin
            grads = _reference(dq, dk, cos, sin, positions, offset, interleaved, False)
        elif needs_grad(dq, dk):
            grads = apply(_Rope, dq, dk, *settings)
        else:
            grads = _Rope.forward(dq, dk, *settings)
        return (*grads, *(None,) * 7)


def launchers(op: Any, inplace_op: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two operators of this file for tensors of any strides: (forward, rotation either way)."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        q, k = with_unit_last_stride(q), with_unit_last_stride(k)
        return op(q, k, *_tables(cos, sin, positions), *options)

    def forward(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        offset: int,
        interleaved: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        if not inplace:
            return rotate(q, k, cos, sin, positions, offset, interleaved, False)
        inplace_op(q, k, *_tables(cos, sin, positions), offset, interleaved)
        return q, k

    return forward, rotate


def _tables(
    cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return cos.contiguous(), sin.contiguous(), None if positions is None else positions.contiguous()


def unsupported_by_kernels(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *options: Any
) -> str | None:
    """Why no kernel takes a call, or None."""
    inplace = options[-1]
    if needs_grad(cos, sin):
        return "cos or sin requires a gradient, which only the torch backend computes"
    if inplace and (q.stride(-1) != 1 or k.stride(-1) != 1) and q.shape[-1] > 1:
        return "in place needs head dimensions that are neighbours in memory"
    return None


def _cpu_supports(q: Tensor, k: Tensor, *others: Any) -> str | None:
    return unsupported_by_kernels(q, k, *others) or unsupported_by_cpu_kernels(q, k)


OP = register_op(
    Op(
        name="rope",
        public=rope,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("q", "k"),
    )
)

register("rope", "cpu", ("cpu",), *launchers(_op, _inplace_op), _cpu_supports)
