"""linear against PyTorch: few rows, as when a model generates, and the many of training.

Floor: few rows read the weights once, so the matrices of a row together are larger than the caches,
as those of a model are; `copy` is a plain copy that reads and writes as many. Many rows
are arithmetic, and own products exist on processors with AMX only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lmfast import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# (outputs, inputs): projections, feed-forward and the output layer of small models.
SHAPES = pytest.mark.parametrize(
    "shape", [(288, 288), (768, 768), (3072, 768), (768, 2048), (32000, 288), (50257, 768)]
)
_COLD_BYTES = 96 << 20


@DTYPES
@SHAPES
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("rows", [1, 8, 32])
def bench_few_rows(
    compare: Callable[..., None],
    shape: tuple[int, int],
    rows: int,
    layout: str,
    dtype: torch.dtype,
) -> None:
    n, k = shape
    count = max(1, _COLD_BYTES // (n * k * dtype.itemsize))
    weights = [torch.randn(n, k).to(dtype) for _ in range(count)]
    if layout == "columns":
        weights = [w.t().contiguous().t() for w in weights]
    x = torch.randn(rows, k).to(dtype)

    def by(product: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for w in weights:
                product(x, w)

        return run

    compare(
        f"linear {count} x {rows}x{k}x{n} {layout} {dtype}",
        by(ops.linear),
        {"torch": by(F.linear)},
        moved=count * weights[0].nbytes,
        rounds=7,
    )


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("shape", [(3712, 128, 512), (2048, 768, 3072)])
def bench_many_rows(
    compare: Callable[..., None], shape: tuple[int, int, int], precision: str
) -> None:
    rows, k, n = shape
    x, weight = torch.randn(rows, k), torch.randn(n, k)
    bias = torch.randn(n)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(
            f"linear with ReLU {rows}x{k}x{n} {precision}",
            lambda: ops.linear(x, weight, bias, relu=True),
            {"torch": lambda: F.linear(x, weight, bias).relu_()},
        )
    finally:
        torch.set_float32_matmul_precision(before)
