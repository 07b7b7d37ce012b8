"""The feed-forward layer, forward and backward, against PyTorch's functions eager and compiled.

ReLU and the bias are part of the matrix product where the product is the library's own: on AMX, and
in medium precision on AVX512-BF16. Elsewhere PyTorch's product is the faster one, ReLU overwrites
its result, and the rows say that nothing is lost. GELU is PyTorch's own in all columns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast import nn

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("shape", [(3712, 128, 512), (2048, 768, 3072)])
def bench_mlp(
    compare: Callable[..., None], shape: tuple[int, int, int], activation: str, precision: str
) -> None:
    rows, width, hidden = shape
    layer = nn.MLP(width, hidden, activation=activation)
    x, dy = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    b_1, b_2 = layer.B_1, layer.B_2

    def plain(x: Tensor) -> Tensor:
        y = ACTIVATIONS[activation](F.linear(x, layer.W_1.t(), b_1))
        return F.linear(y, layer.W_2.t(), b_2)

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            function(x).backward(dy)

        return run

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(
            f"MLP fwd+bwd {rows}x{width}x{hidden} {activation} {precision}",
            step(layer),
            {"torch": step(plain), "compiled": step(torch.compile(plain))},
            rounds=9 if width == 128 else 5,
            flops=12 * rows * width * hidden,
        )
    finally:
        torch.set_float32_matmul_precision(before)
