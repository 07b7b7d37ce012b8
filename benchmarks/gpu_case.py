"""A case of the GPU's benchmark: operands, variants, and the floor of the call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lmfast
from lmfast._dispatch import ops

GPU_BACKENDS = ("cuda", "triton")
# Their backend torch is SDPA, cuBLAS or cuDNN, and may be the fastest.
LIBRARIES = ("attention", "linear", "lora_linear", "elman_rnn", "lstm", "gru")
Variants = dict[str, Callable[..., Any]]


@dataclass
class Case:
    """One operator at one size.

    Attributes:
        make: fresh operands; differentiable ones require a gradient.
        variants: name -> function of the operands.
        moved: fewest bytes one call reads and writes.
        flops: fewest operations on the matrix units, where those are the floor.
        backward: the gradients for random output gradients are part of the call.
        memory: measure the memory of a call as well.
    """

    name: str
    make: Callable[[], tuple[Any, ...]]
    variants: Variants
    moved: int
    backward: bool = False
    call_time: bool = False
    flops: int = 0
    memory: bool = False


def our_variants(op: str, function: Callable[..., Any]) -> Variants:
    """``function(*operands, backend=...)`` on every GPU backend that is there."""
    found = {}
    for backend in (*GPU_BACKENDS, *(("torch",) if op in LIBRARIES else ())):
        if backend not in ops()[op].implementations:
            continue
        if backend == "cuda" and not lmfast._extension.cuda.loaded:
            continue
        found[backend] = lambda *a, b=backend: function(*a, backend=b)
    return found


def with_peers(op: str, function: Callable[..., Any], eager: Callable[..., Any]) -> Variants:
    return {
        **our_variants(op, function),
        "eager": eager,
        "compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }


def operand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


@dataclass
class Switched:
    """A variant that runs, gradients included, with an environment variable set."""

    call: Callable[..., Any]
    variable: str
    value: str

    def __call__(self, *operands: Any) -> Any:
        return self.call(*operands)

    @contextmanager
    def around(self) -> Iterator[None]:
        before = os.environ.get(self.variable)
        os.environ[self.variable] = self.value
        try:
            yield
        finally:
            if before is None:
                del os.environ[self.variable]
            else:
                os.environ[self.variable] = before


def run_once(case: Case, variant: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """One call of a variant, with its gradients if they are part of the case."""
    with variant.around() if isinstance(variant, Switched) else nullcontext():
        return _run(case, variant, operands)


def _run(case: Case, variant: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    outputs = variant(*operands)
    if not case.backward:
        return outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in operands if t.requires_grad]
    # The output stands in for its gradient: same shape and layout, and no extra bytes to make one.
    return torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])
