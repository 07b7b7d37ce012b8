"""swiglu and geglu: known values, accuracy far from zero, packed halves, messages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lmfast import ops


def test_known_values() -> None:
    gate = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    up = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    silu = [0.0, 1 / (1 + math.exp(-1)), -2 / (1 + math.exp(2))]
    exact = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in (0.0, 1.0, -2.0)]
    tanh = [
        x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        for x in (0.0, 1.0, -2.0)
    ]
    for found, activation in (
        (ops.swiglu(gate, up), silu),
        (ops.geglu(gate, up), tanh),
        (ops.geglu(gate, up, approximate="none"), exact),
    ):
        expected = torch.tensor(activation, dtype=torch.float64) * up
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def exactly(kind: str, x: torch.Tensor) -> torch.Tensor:
    """In fp64 without cancellation, which F.gelu has for negative x."""
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x * torch.special.erfc(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("kind", ["silu", "tanh", "none"])
def test_relative_error_everywhere(kind: str, cpu_isa: str) -> None:
    """Values and slopes of single numbers, where samples only see the largest."""
    x = torch.cat((torch.linspace(-8, 8, 16001), torch.logspace(-30, 0.9, 300)))
    x = torch.cat((x, -x)).requires_grad_()
    one = torch.ones_like(x)
    if kind == "silu":
        found = ops.swiglu(x, one, backend="cpu")
    else:
        found = ops.geglu(x, one, approximate=kind, backend="cpu")
    wide = x.detach().double().requires_grad_()
    exact = exactly(kind, wide)
    (slope,) = torch.autograd.grad(found.sum(), x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    eps = torch.finfo(torch.float32).eps
    # The exponent of e^z is itself rounded, to |z| eps; for GELU it grows like x^2 or x^3.
    exponent = x.detach().abs() ** {"silu": 0, "tanh": 3, "none": 2}[kind]
    error = (found - exact).abs() / exact.abs().clamp_min(1e-35)
    assert (error <= (4 + exponent) * eps).all()
    # A slope crosses zero, where only its absolute error is small.
    assert ((slope - exact_slope).abs() <= 4 * eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_of_a_projection_are_read_in_place(dtype: torch.dtype) -> None:
    packed = torch.randn(3, 5, 74).to(dtype).requires_grad_()
    dy = torch.randn(3, 5, 37).to(dtype)
    whole = ops.swiglu(packed)
    gate, up = packed.chunk(2, -1)
    parts = ops.swiglu(gate, up)
    copies = ops.swiglu(gate.contiguous(), up.contiguous())
    assert torch.equal(whole, parts)
    assert torch.equal(whole, copies)
    found = [torch.autograd.grad(y, packed, dy)[0] for y in (whole, parts, copies)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_infinities_and_nan_are_those_of_silu(cpu_isa: str) -> None:
    gate = torch.tensor([-math.inf, math.inf, math.nan, -1e4, 1e4] * 7)
    up = torch.full_like(gate, 2.0)
    expected = F.silu(gate) * up
    found = ops.swiglu(gate, up, backend="cpu")
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_only_one_input_needs_a_gradient() -> None:
    gate, up = torch.randn(4, 9), torch.randn(4, 9, requires_grad=True)
    ops.swiglu(gate, up).sum().backward()
    torch.testing.assert_close(up.grad, F.silu(gate))


def test_messages() -> None:
    x = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"up must have gate's shape \(2, 6\), got \(2, 3\)"):
        ops.swiglu(x, torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"up must have gate's dtype torch.float32, got .*float16"):
        ops.swiglu(x, x.half())
    with pytest.raises(ValueError, match="up must be on gate's device cpu, got meta"):
        ops.swiglu(x, x.to("meta"))
    with pytest.raises(ValueError, match="must be even, got 5"):
        ops.geglu(torch.ones(2, 5))
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'erf'"):
        ops.geglu(x, x, approximate="erf")
    with pytest.raises(ValueError, match="gate must have at least one dimension"):
        ops.swiglu(torch.tensor(1.0))
