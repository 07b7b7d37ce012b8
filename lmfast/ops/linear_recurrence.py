"""First-order linear recurrences over time: the scan inside minGRU and minLSTM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    accumulation_dtype,
    check_same_device,
    check_tensor,
    define,
    needs_grad,
    unsupported_by_cpu_kernels,
)
from lmfast.testing import Sample


def linear_recurrence(
    a: Tensor, b: Tensor, state: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Runs ``h_t = a_t h_{t-1} + b_t`` over the steps of a sequence.

    The state is kept in fp32 (fp64 for fp64 input).

    Args:
        a, b: (B, T, H) of one dtype: float32, bfloat16, float16 or float64; any strides.
        state: (B, H) of the same dtype, before the first step; None for zeros.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (y, state): y (B, T, H) all states, and (B, H) the last one.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes or devices that do not fit.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++, in order over time), triton (parallel scans of 64 steps, in order), torch (a
        parallel scan in log2 T steps). Gradients on all; gradients of gradients through PyTorch.
        Nothing is divided and no logarithm is taken: where a is in (0, 1) and b positive, as in
        minGRU, every operation keeps its relative error, while sums of log a lose as many digits
        as they have before the point.

    Source:
        Hillis and Steele, Data Parallel Algorithms, 1986; Feng et al., Were RNNs All We Needed?,
        2024, arXiv:2410.01201.

    Example:
        >>> import lmfast, torch
        >>> half, one = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
        >>> y, state = lmfast.ops.linear_recurrence(half, one)
        >>> y.flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    args = _check(a, b, state)
    return select(OP, args, backend).forward(*args)


def _check(a: Tensor, b: Tensor, state: Tensor | None = None) -> tuple[Any, ...]:
    a = check_tensor("a", a)
    if a.dim() != 3:
        raise ValueError(f"a must have 3 dimensions (B, T, H), got {tuple(a.shape)}")
    given: dict[str, tuple[Tensor, tuple[int, ...]]] = {"b": (b, tuple(a.shape))}
    if state is not None:
        given["state"] = (state, (a.shape[0], a.shape[2]))
    for name, (t, shape) in given.items():
        if check_tensor(name, t).shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        if t.dtype != a.dtype:
            raise TypeError(f"{name} must have a's dtype {a.dtype}, got {t.dtype}")
        check_same_device(name, t, "a", a)
    return a, b, state


def _scan(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """All states by doubling: after k rounds a step has seen its 2^k predecessors."""
    if state is not None and a.shape[1]:
        first = torch.addcmul(b[:, :1], a[:, :1], state[:, None])
        b = torch.cat((first, b[:, 1:]), 1)
    reach = 1
    while reach < a.shape[1]:
        b = torch.cat((b[:, :reach], torch.addcmul(b[:, reach:], a[:, reach:], b[:, :-reach])), 1)
        a = torch.cat((a[:, :reach], a[:, reach:] * a[:, :-reach]), 1)
        reach *= 2
    return b


def _reference(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(a.dtype)
    given = None if state is None else state.to(wide)
    # Without steps the result still depends on everything: gradients are zeros, not missing.
    y = _scan(a.to(wide), b.to(wide), given) if a.shape[1] else (a + b).to(wide)
    return _with_last(y.to(a.dtype), a, b, state)


def _with_last(y: Tensor, a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    if y.shape[1]:
        return y, y[:, -1]
    nothing = (a + b).sum(1)
    return y, nothing if state is None else state + nothing


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def sample(name: str, batch: int, steps: int, width: int, with_state: bool = True) -> Sample:
        gates = torch.sigmoid(normal(batch, steps, width)).to(dtype)
        state = normal(batch, width).to(dtype) if with_state else None
        return Sample(name, (gates, normal(batch, steps, width).to(dtype), state))

    yield sample("small", 2, 3, 5)
    yield sample("no state", 2, 5, 7, with_state=False)
    yield sample("one step", 3, 1, 4)
    yield sample("wide", 2, 9, 273)
    yield sample("long", 1, 131, 17)
    yield sample("no steps", 2, 0, 3)
    yield sample("no rows", 0, 3, 3)
    a, b, state = sample("", 4, 6, 18).args
    yield Sample(
        "strided",
        (
            a.transpose(0, 1).contiguous().transpose(0, 1),
            b[..., ::2].repeat_interleave(2, 2),
            state,
        ),
    )
    yield Sample("growing", (1.5 * a, b, state))


def _forward_fake(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    return a.new_empty(a.shape)


def _backward_fake(
    dy: Tensor, a: Tensor, y: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dstate = a.new_empty(0 if state is None else a.shape[0], a.shape[2])
    return a.new_empty(a.shape), a.new_empty(a.shape), dstate


_forward_op = define(
    "linear_recurrence(Tensor a, Tensor b, Tensor? state) -> Tensor", _forward_fake
)
_backward_op = define(
    "linear_recurrence_backward(Tensor dy, Tensor a, Tensor y, Tensor? state) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, state: Tensor | None, op: Any, backend: str) -> Tensor:
        return op(a, b, state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, state, _, ctx.backend = inputs
        ctx.save_for_backward(a, b, state, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        a, b, state, y = ctx.saved_tensors
        if recording_backward():
            return *differentiate(_scan, (a, b, state), (dy,)), None, None
        backward = implementation("linear_recurrence", ctx.backend).backward
        assert backward is not None
        da, db, dstate = backward(dy.contiguous(), a, y, state)
        return da, db, None if state is None else dstate, None, None


def launcher(op: Any, backend: str, widen: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of an implementation by an operator with the schema above.

    Args:
        op: the forward operator.
        backend: whose backward belongs to it.
        widen: hand it narrow dtypes in fp32; else it keeps its state in fp32 by itself.
    """

    def run(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(a.dtype) if widen else a.dtype
        given = None if state is None else state.to(wide).contiguous()
        tensors = (a.to(wide).contiguous(), b.to(wide).contiguous(), given)
        if needs_grad(*tensors):
            y = apply(_LinearRecurrence, *tensors, op, backend)
        else:
            y = op(*tensors)
        return _with_last(y.to(a.dtype), a, b, state)

    return run


OP = register_op(
    Op(
        name="linear_recurrence",
        public=linear_recurrence,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("a", "b", "state"),
    )
)

register(
    "linear_recurrence",
    "cpu",
    ("cpu",),
    launcher(_forward_op, "cpu", widen=True),
    _backward_op,
    lambda *tensors: unsupported_by_cpu_kernels(*tensors),
)
