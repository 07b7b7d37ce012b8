"""RMSNorm beyond what every op must do: golden numbers, special values, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmfast import ops
from lmfast.testing import assert_within_error_rule

GOLDEN = [
    ([1.0, 2.0, 3.0, 4.0], [0.365148371, 0.730296743, 1.095445114, 1.460593486]),
    (
        [0.8, 0.6, 0.7, 0.3, 0.5, 0.4],
        [1.389117771, 1.041838329, 1.21547805, 0.520919164, 0.868198607, 0.694558886],
    ),
]


@pytest.mark.parametrize(("values", "expected"), GOLDEN)
@pytest.mark.parametrize("backend", ["torch", None])
def test_golden_numbers(values: list[float], expected: list[float], backend: str | None) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    found = ops.rms_norm(x, eps=1e-8, backend=backend)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_agrees_with_torch(cpu_isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w = torch.randn(33, 257).to(dtype), torch.randn(257).to(dtype)
        found = ops.rms_norm(x, w, 1e-5)
        peer = torch.nn.functional.rms_norm(x, (257,), w, 1e-5)
        exact = torch.nn.functional.rms_norm(x.double(), (257,), w.double(), 1e-5)
        assert_within_error_rule(found, peer, exact, str(dtype))


def test_gradient_of_a_long_batch_is_as_exact_as_torchs(cpu_isa: str) -> None:
    x = torch.randn(5000, 48, requires_grad=True)
    w = torch.randn(48, requires_grad=True)
    dy = torch.randn(5000, 48)
    found = torch.autograd.grad(ops.rms_norm(x, w), (x, w), dy)
    peer = torch.autograd.grad(torch.nn.functional.rms_norm(x, (48,), w, 1e-6), (x, w), dy)
    xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = torch.autograd.grad(ops.rms_norm(xd, wd, backend="torch"), (xd, wd), dy.double())
    for f, p, e, name in zip(found, peer, exact, ("dx", "dweight")):
        assert_within_error_rule(f, p, e, name)


def test_zero_rows_give_exact_zeros(cpu_isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(
            ops.rms_norm(torch.zeros(3, 20).to(dtype), eps=1e-8), torch.zeros(3, 20).to(dtype)
        )


def test_nan_and_inf_stay_in_their_rows(cpu_isa: str) -> None:
    x = torch.ones(4, 37)
    x[1, 5] = float("nan")
    x[2, 36] = float("inf")
    found, expected = ops.rms_norm(x), ops.rms_norm(x, backend="torch")
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[[0, 3]].isfinite().all()


def test_weight_may_stay_fp32_beside_half_precision() -> None:
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    w = torch.randn(64, requires_grad=True)
    y = ops.rms_norm(x, w)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


def test_frozen_weight_gets_no_gradient() -> None:
    x, w = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    ops.rms_norm(x, w).sum().backward()
    assert x.grad is not None
    assert w.grad is None


def strided(shape: list[int], steps: list[int], order: int) -> Tensor:
    """A view with any strides of the leading dimensions, made from a larger tensor."""
    big = torch.randn([n * s for n, s in zip(shape, steps)])
    view = big[tuple(slice(None, None, s) for s in steps)]
    lead = list(range(view.dim() - 1))
    return view.permute(
        *(lead[order % max(1, len(lead)) :] + lead[: order % max(1, len(lead))]), -1
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    width=st.integers(1, 70),
    steps=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    order=st.integers(0, 4),
    weighted=st.booleans(),
)
def test_any_shape_and_stride(
    shape: list[int], width: int, steps: list[int], order: int, weighted: bool
) -> None:
    x = strided([*shape, width], steps[: len(shape) + 1], order)
    weight = torch.randn(width) if weighted else None
    found, plain = ops.rms_norm(x, weight), ops.rms_norm(x, weight, backend="torch")
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    y, total = ops.add_rms_norm(x, x.flip(-1), weight)
    assert torch.equal(total, x + x.flip(-1))
    torch.testing.assert_close(
        y, ops.rms_norm(total, weight, backend="torch"), atol=1e-5, rtol=1e-5
    )


def test_more_leading_dimensions_than_the_kernel_walks() -> None:
    x = torch.randn(2, 2, 2, 2, 2, 2, 2, 16)[..., ::1].permute(6, 4, 2, 0, 1, 3, 5, 7)
    torch.testing.assert_close(ops.rms_norm(x), ops.rms_norm(x, backend="torch"))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(4)),
            ValueError,
            r"weight.*\(3,\).*\(4,\)",
        ),
        (lambda: ops.rms_norm(torch.tensor(1.0)), ValueError, "at least one dimension"),
        (lambda: ops.rms_norm(torch.ones(2), torch.ones(2).int()), TypeError, "weight.*int32"),
        (lambda: ops.rms_norm(torch.ones(2), eps="small"), TypeError, "eps must be a float"),
        (
            lambda: ops.rms_norm(torch.ones(2), torch.ones(2, device="meta")),
            ValueError,
            "weight must be on x's device",
        ),
        (lambda: ops.add_rms_norm(torch.ones(2), torch.ones(3)), ValueError, "residual.*shape"),
        (
            lambda: ops.add_rms_norm(torch.ones(2), torch.ones(2).double()),
            TypeError,
            "residual must have x's dtype",
        ),
    ],
)
def test_errors_name_the_argument(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
