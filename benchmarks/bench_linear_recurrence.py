"""linear_recurrence against the parallel scan that is its reference.

Floor: the bytes it must read and write once; `copy` is a plain copy of as many.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lmfast import ops


@pytest.mark.parametrize("gradients", [False, True], ids=["fwd", "fwd+bwd"])
def bench_linear_recurrence(compare: Callable[..., None], gradients: bool) -> None:
    a = torch.sigmoid(torch.randn(16, 512, 256)).requires_grad_(gradients)
    b = torch.randn(16, 512, 256, requires_grad=gradients)
    dy = torch.randn(16, 512, 256)

    def run(backend: str) -> object:
        y, _ = ops.linear_recurrence(a, b, backend=backend)
        return torch.autograd.grad(y, (a, b), dy) if gradients else y

    compare(
        f"linear_recurrence 16x512x256{' fwd+bwd' if gradients else ''}",
        lambda: run("cpu"),
        {"scan": lambda: run("torch")},
        moved=(8 if gradients else 3) * a.nbytes,
        rounds=9,
    )
