"""Checks of one op on one backend, shared by the tests of all ops, the interpreter and the GPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmfast._dispatch import Op, ops
from lmfast.testing import Sample, assert_within_error_rule, relative_error

# Ops whose results are weighted sums over as many terms as there are keys.
SUMS = ("attention", "cached_attention", "decode_attention")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ops_with(backend: str) -> list[Op]:
    """The registered ops that have an implementation on ``backend``."""
    return [op for op in ops().values() if backend in op.implementations]


def cases(
    backend: str, device: str, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Iterator[tuple[str, Op, Sample]]:
    """(id, op, sample) for every op of a backend, dtype and sample that it takes."""
    for op in ops_with(backend):
        supports = op.implementations[backend].supports
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            found = [
                sample
                for sample in op.sample_inputs(device, dtype)
                if supports(*op.check(*sample.args, **sample.kwargs)) is None
            ]
            assert found, f"{op.name} has no {kind} sample that {backend} takes"
            for sample in found:
                yield f"{op.name}-{kind}-{sample.name}".replace(" ", "_"), op, sample


def call(op: Op, sample: Sample, backend: str) -> tuple[Tensor, ...]:
    """The op's outputs as a tuple, and after them copies of arguments that it wrote to."""
    copies: dict[str, Tensor] = {}
    if op.mutates:
        bound = inspect.signature(op.public).bind(*sample.args, **sample.kwargs)
        arguments = dict(bound.arguments)
        copies = {n: t.clone() for n, t in arguments.items() if n in op.mutates and t is not None}
        result = op.public(**{**arguments, **copies}, backend=backend)
    else:
        result = op.public(*sample.args, **sample.kwargs, backend=backend)
    return *(result if isinstance(result, tuple) else (result,)), *copies.values()


def call_on_copies(op: Op, sample: Sample, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The op's outputs for other positional arguments, none of which is written to."""
    args = [t.clone() if isinstance(t, Tensor) else t for t in tensors]
    result = op.public(*args, **sample.kwargs, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def with_gradients(op: Op, sample: Sample) -> tuple[dict[str, Any], list[Tensor]]:
    """The sample's arguments by name, fresh leaves where the op is differentiable; the leaves."""
    arguments = dict(inspect.signature(op.public).bind(*sample.args, **sample.kwargs).arguments)
    leaves = []
    for name in op.differentiable:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            arguments[name] = value.detach().requires_grad_()
            leaves.append(arguments[name])
    return arguments, leaves


def gradients(op: Op, sample: Sample, backend: str) -> list[Tensor]:
    """Gradients of every differentiable argument for fixed, uneven output gradients."""
    if not op.differentiable:
        return []
    arguments, leaves = with_gradients(op, sample)
    result = op.public(**arguments, backend=backend)
    outputs = result if isinstance(result, tuple) else (result,)
    seeds = []
    for i, out in enumerate(outputs):
        steps = torch.arange(out.numel(), device=out.device).reshape(out.shape)
        seeds.append(((steps * 37 + 11 * i) % 64 / 32 - 1).to(out.dtype))
    return list(torch.autograd.grad(outputs, leaves, seeds))


def check_values(op: Op, sample: Sample, backend: str) -> None:
    """Outputs are within the error rule, and no argument was written to."""
    before = sample.map(Tensor.clone)
    got = call(op, sample, backend)
    for now, then in zip(sample.tensors(), before.tensors(), strict=True):
        torch.testing.assert_close(
            now, then, rtol=0, atol=0, equal_nan=True, msg="an argument was written to"
        )
    plain, exact = call(op, sample, "torch"), call(op, sample.to_fp64(), "torch")
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        if g.dtype == torch.int64:  # a choice is right or wrong
            assert torch.equal(g, e), f"output {i}"
        elif not g.is_floating_point():  # int8 storage: a number halfway may go the other way
            assert (g.long() - p.long()).abs().max() <= 1, f"output {i}"
        elif op.name in SUMS:
            # Scores in base 2 are 1.44 times as large, and so is their rounding.
            assert_sum_within_rule(g, p, e, f"output {i}", 1.5 * 1.45)
        else:
            assert_within_error_rule(g, p, e, f"output {i}")


def assert_sum_within_rule(
    value: Tensor, plain: Tensor, exact: Tensor, what: str, factor: float = 1.5
) -> None:
    """The error rule with the unit in the last place of the largest element: weight gradients and
    attention are sums, and the rounding of a sum follows its terms, not what they cancel to."""
    assert value.shape == plain.shape, what
    assert value.dtype == plain.dtype, what
    if exact.numel() == 0:
        return
    assert value.isfinite().all(), what
    unit = torch.finfo(value.dtype).eps
    error, plain_error = (value - exact).abs().max(), (plain - exact).abs().max()
    assert error <= factor * plain_error + unit * exact.abs().max(), (
        f"{what}: error {error:.3e}, PyTorch's {plain_error:.3e}"
    )
    whole, plain_whole = relative_error(value, exact), relative_error(plain, exact)
    assert whole <= factor * plain_whole + unit / 4, (
        f"{what}: relative error {whole:.3e}, PyTorch's {plain_whole:.3e}"
    )


def check_gradients(op: Op, sample: Sample, backend: str) -> None:
    """Gradients are within the error rule."""
    got = gradients(op, sample, backend)
    plain, exact = gradients(op, sample, "torch"), gradients(op, sample.to_fp64(), "torch")
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        # The reference keeps weights and their gradients in fp32; kernels round both to the dtype
        # on the way into the matrix units. Seen on tiny samples: up to 3.1 times its error.
        # The scores' gradients of additive attention add up to zero: seen on sums of ten up to 3.
        # Errors of the output layer's few numbers scatter: in Triton 0.6 to 2.7 times PyTorch's
        # from draw to draw, those of 24 draws together 1.15 times.
        few = ("additive_attention", "linear_cross_entropy")
        factor = 4.0 if op.name in (*SUMS, *few) else 1.5
        assert_sum_within_rule(g, p, e, f"gradient {i}", factor)


class RecordCalls(TorchDispatchMode):
    """Keeps every call of one of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "lmfast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Keeps the largest number of elements that an operation made anew."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result
