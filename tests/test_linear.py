"""linear: medium precision, gradients in the weight's layout, what the kernel leaves to PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmfast
from lmfast import _extension, ops
from lmfast.ops._precision import bf16_products_allowed, tf32_products_allowed
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
    assert "for 255 rows" in capsys.readouterr().out
    with torch.autocast("cpu", torch.bfloat16):
        assert lmfast.explain("linear", x, weight) == "torch"
        assert ops.linear(x, weight).dtype == torch.bfloat16
    assert lmfast.explain("linear", x.bfloat16(), weight.bfloat16()) == "torch"


needs_kernels = pytest.mark.usefixtures("needs_cpu_kernels")


@needs_kernels
@pytest.mark.parametrize(("dtype", "most"), [("float32", 32), ("bfloat16", 8), ("float16", 32)])
def test_chooses_the_kernel_of_few_rows(
    dtype: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    x, weight = torch.ones(most + 1, 128, dtype=getattr(torch, dtype)), torch.ones(128, 128)
    weight = weight.to(x.dtype)
    assert lmfast.explain("linear", x[:most], weight) == "cpu"
    assert lmfast.explain("linear", x[:most], weight[:64]) == "torch"  # a tiny matrix
    assert lmfast.explain("linear", x, weight) == "torch"
    reasons = (f"more than {most} rows", "256 rows and widths of 64 are the least")  # the 2nd: AMX
    out = capsys.readouterr().out
    assert any(reason in out for reason in reasons)
    with lmfast.use_backend("torch"):
        assert lmfast.explain("linear", x[:most], weight) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert lmfast.explain("linear", x[:most], weight) == "torch"


# The level stays the same for all examples of a test.
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_few_rows_of_any_shape_and_strides(cpu_isa: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 32), "rows")
    depth = data.draw(st.integers(1, 600), "depth")
    columns = data.draw(st.integers(1, 80), "columns")
    columns += max(0, -(-(1 << 14) // depth) - columns)  # a matrix that is not tiny
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    rows = min(rows, 8) if dtype == torch.bfloat16 else rows
    gap = data.draw(st.integers(0, 3), "gap")
    generator = torch.Generator().manual_seed(depth)

    def matrix(n: int, k: int) -> torch.Tensor:
        wide = torch.randn(n, k + gap, generator=generator) / depth**0.25
        return wide.to(dtype)[:, :k]

    by_columns = data.draw(st.booleans(), "by columns")
    weight = matrix(depth, columns).t() if by_columns else matrix(columns, depth)
    x = matrix(rows, depth)
    bias = matrix(1, columns)[0] if data.draw(st.booleans(), "bias") else None
    relu = data.draw(st.booleans(), "relu")
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    exact = exact.relu() if relu else exact
    size = x.double().abs() @ weight.double().abs().t() + 1.0
    # Sums in fp32 (2^-24 per addition, at most `depth` in a chain), rounded once to dtype.
    once = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    error = (ops.linear(x, weight, bias, relu=relu, backend="cpu").double() - exact).abs()
    assert (error <= once * exact.abs() + 2.0**-24 * depth**0.5 * size).all()


@needs_kernels
def test_few_rows_alone_and_together_give_the_same_bits() -> None:
    x, weight = torch.randn(32, 777), torch.randn(99, 777)
    together = ops.linear(x, weight)
    for r in range(32):
        assert torch.equal(ops.linear(x[r], weight), together[r])
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.linear(x, weight), together)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_few_rows_propagate_nan_and_infinity() -> None:
    x, weight = torch.randn(3, 200), torch.randn(200, 200)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    for w in (weight, weight.t().contiguous().t()):
        for relu in (False, True):
            expected = torch.nn.functional.linear(x, w)
            expected = expected.relu() if relu else expected
            torch.testing.assert_close(
                ops.linear(x, w, relu=relu), expected, equal_nan=True, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(128, 256, dtype=dtype, requires_grad=True)
    y = ops.linear(torch.randn(0, 3, 256, dtype=dtype), weight, relu=True)
    y.sum().backward()
    assert y.shape == (0, 3, 128)
    assert not weight.grad.any()


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"weight must be \(N, K\).*got \(3, 5\) for x \(2, 4\)"):
        ops.linear(torch.ones(2, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\), got \(4,\)"):
        ops.linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4))
    with pytest.raises(TypeError, match="weight must have x's dtype"):
        ops.linear(torch.ones(2, 4), torch.ones(3, 4).half())


@pytest.mark.parametrize(("given", "rounded"), [("none", False), ("bf16", True)])
def test_the_precision_may_be_set_for_each_library(given: str, rounded: bool) -> None:
    """By ``torch.backends``: the common setting cannot be read afterwards, and PyTorch raises."""
    x, weight = torch.randn(300, 64), torch.randn(96, 64)
    matmul = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [m.fp32_precision for m in matmul]
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = given
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        assert bf16_products_allowed() is rounded
        assert tf32_products_allowed()
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.t(), rtol=0.05, atol=0.2)
        ops.linear_cross_entropy(x, weight, torch.zeros(300, dtype=torch.int64))
        ops.elman_rnn(x[None], None, (torch.randn(32, 64), torch.randn(32, 32)))
    finally:
        for m, precision in zip(matmul, before, strict=True):
            m.fp32_precision = precision
    assert torch.get_float32_matmul_precision() == "highest"
