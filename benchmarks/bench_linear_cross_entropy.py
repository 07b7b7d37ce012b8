"""The output layer and its loss with gradients, against PyTorch eager, its fused op and chunks.

The shape is that of the reference models: 128 sequences of 29 tokens, E = 128, V = 32,011; three
products of 30.4 GFLOP each, 475 MB of fp32 logits where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lmfast import ops

N, E, V = 3712, 128, 32011


@pytest.mark.parametrize("layout", ["VE", "EV"])
@pytest.mark.parametrize("kind", ["fp32", "medium", "bf16"])
def bench_linear_cross_entropy(compare: Callable[..., None], kind: str, layout: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    hidden = torch.randn(N, E).to(dtype).requires_grad_()
    weight = (torch.randn(V, E) * 0.05).to(dtype)
    weight = (weight.t().contiguous().t() if layout == "EV" else weight).requires_grad_()
    targets = torch.randint(V, (N,))

    def step(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            function(hidden, weight, targets).backward()

        return run

    peers = {
        "eager": step(lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t)),
        "chunks": step(lambda h, w, t: ops.linear_cross_entropy(h, w, t, backend="torch")),
    }
    if hasattr(F, "linear_cross_entropy"):
        peers["torch's op"] = step(F.linear_cross_entropy)
    torch.set_float32_matmul_precision("medium" if kind == "medium" else "highest")
    try:
        compare(
            f"linear_cross_entropy fwd+bwd {N}x{E}x{V} {kind} {layout}",
            step(ops.linear_cross_entropy),
            peers,
            rounds=5,
        )
    finally:
        torch.set_float32_matmul_precision("highest")
