"""linear: medium precision, gradients in the weight's layout, what the kernel leaves to PyTorch."""

from __future__ import annotations

import pytest
import torch

import lmfast
from lmfast import _extension, ops
from lmfast.testing import relative_error

needs_amx = pytest.mark.skipif(
    not _extension.cpu.loaded or _extension.cpu_isa() != "amx", reason="needs AMX"
)
needs_tiles = pytest.mark.skipif(not _extension.has_bf16_tiles(), reason="needs AMX or AVX512-BF16")


@needs_tiles
@pytest.mark.parametrize("depth", [65, 2100])
def test_medium_precision_rounds_factors_once(depth: int) -> None:
    x, weight = torch.randn(300, depth, requires_grad=True), torch.randn(depth, 70)
    weight, bias, dy = weight.requires_grad_(), torch.randn(70), torch.randn(300, 70)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        y = ops.linear(x, weight.t(), bias, relu=True, backend="cpu")
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    finally:
        torch.set_float32_matmul_precision(before)
    xb, wb = x.detach().bfloat16().double(), weight.detach().bfloat16().double()
    assert relative_error(y, (xb @ wb + bias).relu()) < 1e-6
    masked = (dy * (y > 0)).bfloat16().double()
    assert relative_error(dx, masked @ wb.t()) < 1e-6
    assert relative_error(dweight, xb.t() @ masked) < 1e-6


@needs_tiles
def test_compiles_in_medium_precision() -> None:
    x, weight = torch.randn(300, 64), torch.randn(96, 64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert lmfast.explain("linear", x, weight) == "cpu"
        compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), ops.linear(x, weight))
    finally:
        torch.set_float32_matmul_precision(before)


@needs_amx
def test_chooses_the_kernel_where_it_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    x, weight = torch.randn(256, 64), torch.randn(64, 64)
    assert lmfast.explain("linear", x, weight) == "cpu"
    assert lmfast.explain("linear", x[:255], weight) == "torch"
    assert "below 256 rows" in capsys.readouterr().out
    with torch.autocast("cpu", torch.bfloat16):
        assert lmfast.explain("linear", x, weight) == "torch"
        assert ops.linear(x, weight).dtype == torch.bfloat16
    assert lmfast.explain("linear", x.bfloat16(), weight.bfloat16()) == "torch"


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"weight must be \(N, K\).*got \(3, 5\) for x \(2, 4\)"):
        ops.linear(torch.ones(2, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\), got \(4,\)"):
        ops.linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4))
    with pytest.raises(TypeError, match="weight must have x's dtype"):
        ops.linear(torch.ones(2, 4), torch.ones(3, 4).half())
