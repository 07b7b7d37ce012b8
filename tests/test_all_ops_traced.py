"""What must hold for every registered op under tracing: opcheck, and torch.compile in one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_checks import RecordCalls
from test_all_ops import (
    EVERY_OP,
    KERNEL_CASES,
    OPS,
    gradients,
    gradients_of,
    outputs,
    samples,
    with_gradients,
    with_kernel,
    written,
)
from torch import Tensor

TRACED: set[Any] = set()


def kind_of(value: Any) -> Any:
    """What a traced graph can depend on: of tensors all but sizes above one, of numbers the type.

    Tracing with dynamic shapes takes sizes of 0 and 1 for constants and all others for symbols.
    """
    if isinstance(value, Tensor):
        sizes = tuple(min(size, 2) for size in value.shape)
        return value.dtype, sizes, value.is_contiguous(), value.storage_offset() > 0
    if isinstance(value, (list, tuple)):
        return tuple(map(kind_of, value))
    return value if isinstance(value, (bool, str, type(None))) else type(value)


@pytest.mark.parametrize(
    ("op", "index"), [c.values[:2] for c in KERNEL_CASES if c.values[2] == torch.float32]
)
def test_opcheck(op: str, index: int, needs_cpu_kernels: None) -> None:
    with RecordCalls() as recorded:
        gradients(op, samples(op, torch.float32)[index], "cpu")
    assert recorded.calls, "no lmfast operator was called"
    for function, args, kwargs in recorded.calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        kind = (function, kind_of(detached), kind_of(sorted(kwargs.items())))
        if kind not in TRACED:  # nine tenths of the time
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(function, detached, kwargs, test_utils=checks)
        TRACED.add(kind)


@EVERY_OP
def test_compiles_in_one_graph(op: str, needs_cpu_kernels: None) -> None:
    with_kernel(op)
    for sample in samples(op, torch.float32)[:12:3]:
        torch._dynamo.reset()
        arguments, leaves = with_gradients(op, sample)
        results = outputs(OPS[op].public(**arguments))
        expected = [*results, *written(op, arguments), *gradients_of(results, leaves)]

        function: Callable[..., Any] = torch.compile(
            OPS[op].public, fullgraph=True, backend="aot_eager"
        )
        arguments, leaves = with_gradients(op, sample)
        results = outputs(function(**arguments))
        found = [*results, *written(op, arguments), *gradients_of(results, leaves)]
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)
