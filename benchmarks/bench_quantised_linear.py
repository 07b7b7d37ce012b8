"""quantised_linear of few rows against PyTorch: its own int8 product, and the matrix unquantised.

Floor: the codes and scales are read once, so the matrices of a row together are larger than the
caches, as those of a model are; `copy` is a plain copy that reads and writes as many bytes.
`widened` is what there is without a kernel: PyTorch's product of the matrix, widened at each call.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lmfast import ops

SHAPES = pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (4096, 4096), (32000, 288)])
_COLD_BYTES = 96 << 20


@SHAPES
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def bench_quantised_linear(
    compare: Callable[..., None],
    shape: tuple[int, int],
    bits: int,
    rows: int,
    dtype: torch.dtype,
) -> None:
    n, k = shape
    count = max(2, _COLD_BYTES * 8 // (n * k * bits))
    weight = torch.randn(n, k) / k**0.5
    first = ops.quantise_weight(weight, bits)
    stored = [tuple(t.clone() for t in first) for _ in range(count)]
    x = torch.randn(rows, k).to(dtype)
    # As many bytes of these, at fewer matrices, would be another time: the time is for one matrix.
    plain = [weight.to(dtype) for _ in range(max(2, _COLD_BYTES // (n * k * dtype.itemsize)))]

    def ours(backend: str | None = None) -> Callable[[], None]:
        def run() -> None:
            for codes, scales in stored:
                ops.quantised_linear(x, codes, scales, backend=backend)

        return run

    def unquantised() -> None:
        for i in range(count):
            F.linear(x, plain[i % len(plain)])

    peers: dict[str, Callable[[], None]] = {f"{dtype} matrix": unquantised}
    if n * k * count < 1 << 26 or count == 2:
        peers["widened"] = ours("torch")
    if bits == 8:
        scales = first[1].to(dtype)

        def int8pack() -> None:
            for codes, _ in stored:
                torch.ops.aten._weight_int8pack_mm(x, codes, scales)

        peers["torch int8"] = int8pack
    compare(
        f"quantised_linear int{bits} {count} x {rows}x{k}x{n} {dtype}",
        ours(),
        peers,
        moved=count * sum(t.nbytes for t in first),
        rounds=5,
    )
