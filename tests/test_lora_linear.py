"""lora_linear: the formula, its errors and gradients, sizes of zero, arguments that are missing."""

from __future__ import annotations

import pytest
import torch
from golden import fill
from torch import Tensor, nn

from lmfast import ops
from lmfast.testing import assert_within_error_rule


def test_golden() -> None:
    x = torch.tensor([[1.0, -1.0, 0.5, 2.0]], dtype=torch.float64)
    w, a, b = fill(50, (4, 3)), fill(51, (4, 2)), fill(52, (2, 3))
    y = ops.lora_linear(x, w.t(), a, b, scale=4 / 2)
    exact = torch.tensor([[-0.923596935, -0.032919922, 0.873239845]], dtype=torch.float64)
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-9)  # the golden values' last digit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", [False, True])
def test_error_rule(dtype: torch.dtype, dropped: bool) -> None:
    torch.manual_seed(3)
    shapes = ((300, 96), (80, 96), (96, 8), (8, 80), (80,), (300, 96))
    tensors = [(torch.randn(s) / s[-1] ** 0.25).to(dtype).requires_grad_() for s in shapes]
    dy = torch.randn(300, 80).to(dtype)

    def results(dtype: torch.dtype, plain: bool) -> list[Tensor]:
        cast = [t.detach().to(dtype).requires_grad_() for t in tensors]
        x, w, a, b, bias, low = cast
        used = cast if dropped else cast[:-1]
        low_input = low if dropped else x
        if plain:
            y = nn.functional.linear(x, w, bias) + 1.5 * ((low_input @ a) @ b)
        else:
            low_input = low if dropped else None
            y = ops.lora_linear(x, w, a, b, bias=bias, scale=1.5, low=low_input)
        return [y, *torch.autograd.grad(y, used, dy.to(dtype))]

    exact = results(torch.float64, True)
    for f, p, e in zip(results(dtype, False), results(dtype, True), exact, strict=True):
        assert_within_error_rule(f, p, e)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize(
    "sizes",
    [((2, 3), 0, 5, 2), ((2, 3), 4, 0, 2), ((2, 3), 4, 5, 0), ((0, 3), 4, 0, 2), ((), 4, 5, 2)],
    ids=["no features", "no outputs", "no ranks", "no rows and outputs", "vector"],
)
def test_empty_sizes_and_vectors(
    sizes: tuple[tuple[int, ...], int, int, int], backend: str | None
) -> None:
    leading, k, n, rank = sizes
    shapes = ((*leading, k), (n, k), (k, rank), (rank, n), (n,))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    x, w, a, b, bias = leaves
    y = ops.lora_linear(x, w, a, b, bias=bias, scale=0.5, backend=backend)
    exact = nn.functional.linear(x, w, bias) + 0.5 * (x @ a @ b)
    # fp64 sums of fewer than ten terms of order 1.
    torch.testing.assert_close(y, exact, rtol=1e-13, atol=1e-13)
    found, expected = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, exact))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_a_transposed_low_input() -> None:
    x, w, a, b = (torch.randn(s, dtype=torch.float64) for s in ((6, 9), (5, 9), (9, 2), (2, 5)))
    low = torch.randn(9, 6, dtype=torch.float64).t().requires_grad_()
    dy = torch.randn(6, 5, dtype=torch.float64)
    (dlow,) = torch.autograd.grad(ops.lora_linear(x, w, a, b, low=low), low, dy)
    torch.testing.assert_close(dlow, dy @ b.t() @ a.t(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["weight", "a", "b"])
def test_a_missing_factor_is_named(name: str) -> None:
    given = {"weight": torch.ones(3, 2), "a": torch.ones(2, 1), "b": torch.ones(1, 3), name: None}
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got NoneType"):
        ops.lora_linear(torch.ones(1, 2), **given)  # type: ignore[arg-type]


def test_autocast_takes_the_fused_products() -> None:
    shapes = ((300, 96), (80, 96), (96, 8), (8, 80))
    torch.manual_seed(3)
    x, w, a, b = ((torch.randn(s) / s[-1] ** 0.25).requires_grad_() for s in shapes)
    w.requires_grad_(False)
    dy = torch.randn(300, 80)
    used = (x, a, b)

    def results(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if fused:
                y = ops.lora_linear(x, w, a, b, scale=1.5)
            else:
                y = nn.functional.linear(x, w) + 1.5 * ((x @ a) @ b)
        assert y.dtype == dtype
        saved = y.grad_fn.name()
        assert ("LoRALinear" in saved) == fused, saved
        return [y.float(), *torch.autograd.grad(y, used, dy.to(dtype))]

    exact = results(False, torch.float32)
    for f, p, e in zip(
        results(True, torch.bfloat16), results(False, torch.bfloat16), exact, strict=True
    ):
        assert f.dtype == torch.float32
        assert_within_error_rule(f.bfloat16(), p.bfloat16(), e.double())
