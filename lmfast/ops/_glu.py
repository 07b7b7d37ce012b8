"""What the gated linear units ``swiglu`` and ``geglu`` share: arguments, gradients, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import implementation, ops
from lmfast.ops._autograd import differentiate, recording_backward
from lmfast.ops._library import (
    accumulation_dtype,
    check_same_device,
    check_tensor,
    define,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.testing import Sample


def check_glu_arguments(gate: Tensor, up: Tensor | None) -> None:
    """Raises TypeError or ValueError for what no gated linear unit can take."""
    check_tensor("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate must have at least one dimension, got a scalar tensor")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                "gate without up holds both in halves of its last dimension, which must be even, "
                f"got {gate.shape[-1]}"
            )
        return
    check_tensor("up", up)
    if up.shape != gate.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    check_same_device("up", up, "gate", gate)


def glu_reference(
    activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor | None
) -> Tensor:
    """``activation(gate) * up`` in fp32 (fp64 for fp64), rounded once."""
    dtype = gate.dtype
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    wide = accumulation_dtype(dtype)
    return (activation(gate.to(wide)) * up.to(wide)).to(dtype)


def glu_samples(device: str, dtype: torch.dtype, **options: Any) -> Iterator[Sample]:
    """One, primes, one more than a vector, none, more than a block; halves, slices, strides."""
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return (3 * torch.randn(shape, generator=generator, device=device)).to(dtype)

    for shape in ((4, 16), (1, 1), (7,), (3, 77), (2, 3, 17), (5, 0), (0, 8), (2, 4103), (301, 64)):
        name = "x".join(map(str, shape))
        yield Sample(name, (normal(*shape), normal(*shape)), options)
    yield Sample("packed", (normal(3, 5, 34),), options)
    yield Sample("chunks of one tensor", tuple(normal(3, 4, 44).chunk(2, -1)), options)
    yield Sample("strides differ", (normal(3, 5, 8), normal(5, 3, 8).transpose(0, 1)), options)
    yield Sample("last dimension strided", (normal(12, 6).t(), normal(6, 12)), options)
    far = torch.tensor([[-1e3, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 1e3]], device=device)
    yield Sample("far out", (far.to(dtype).repeat(1, 3), normal(1, 24)), options)


def define_glu(name: str, option: str = "") -> tuple[Any, Any]:
    """Defines ``lmfast::<name>`` and ``lmfast::<name>_backward``; returns both callables.

    Without up the gradients of both halves are the first result, and the second is empty.
    """

    def forward_fake(gate: Tensor, up: Tensor | None, *options: Any) -> Tensor:
        if up is not None:
            return gate.new_empty(gate.shape)
        return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))

    def backward_fake(
        dy: Tensor, gate: Tensor, up: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)

    arguments = f"Tensor gate, Tensor? up{option}"
    return (
        define(f"{name}({arguments}) -> Tensor", forward_fake),
        define(f"{name}_backward(Tensor dy, {arguments}) -> (Tensor, Tensor)", backward_fake),
    )


class Glu(torch.autograd.Function):
    """One of the gated linear units, by name, on one backend. Saves its inputs only."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor | None, name: str, backend: str, *options: Any) -> Tensor:
        return implementation(name, backend).forward(gate, up, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.name, ctx.backend, *ctx.options = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        rest = (None, None, *(None for _ in ctx.options))
        if recording_backward():
            reference = ops()[ctx.name].reference
            grads = differentiate(lambda g, u: reference(g, u, *ctx.options), (gate, up), (dy,))
            return *grads, *rest
        backward = implementation(ctx.name, ctx.backend).backward
        assert backward is not None
        dgate, dup = backward(dy, gate, up, *ctx.options)
        return dgate, None if up is None else dup, *rest


def launchers(forward_op: Any, backward_op: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two operators of ``define_glu`` for tensors of any strides."""

    def forward(gate: Tensor, up: Tensor | None, *options: Any) -> Tensor:
        return forward_op(with_unit_last_stride(gate), _rows(up), *options)

    def backward(
        dy: Tensor, gate: Tensor, up: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        dy, gate = with_unit_last_stride(dy), with_unit_last_stride(gate)
        return backward_op(dy, gate, _rows(up), *options)

    return forward, backward


def _rows(up: Tensor | None) -> Tensor | None:
    return None if up is None else with_unit_last_stride(up)


def unsupported_by_cpu(gate: Tensor, up: Tensor | None, *options: Any) -> str | None:
    """Why the C++ kernels cannot take these tensors, or None."""
    return unsupported_by_cpu_kernels(gate, up)
