"""Masks of attention: those that show runs of keys are skipped over, all others are applied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmfast import ops
from lmfast.testing import relative_error

pytestmark = pytest.mark.usefixtures("needs_cpu_kernels")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T = 150
QUERY, KEY = torch.arange(T)[:, None], torch.arange(T)
DOCUMENT = torch.tensor([0] * 40 + [1] * 1 + [2] * 64 + [3] * 45)


def batch(*masks: Tensor) -> Tensor:
    return torch.stack([m.expand(T, T) for m in masks])[:, None]


# Each query sees one run of keys, and runs move on with the queries.
RUNS: dict[str, Callable[[], Tensor]] = {
    "causal": lambda: KEY <= QUERY,
    "window": lambda: (KEY <= QUERY) & (KEY > QUERY - 20),
    "band": lambda: (KEY - QUERY).abs() < 30,
    "prefix": lambda: (KEY <= QUERY) | ((KEY < 50) & (QUERY < 50)),
    "documents": lambda: (KEY <= QUERY) & (DOCUMENT == DOCUMENT[:, None]),
    "padding, per row": lambda: batch(KEY < 100, KEY < 150),
    "left padding, per row": lambda: batch((KEY <= QUERY) & (KEY >= 70), KEY <= QUERY),
    "keys only": lambda: (KEY < 77).expand(1, T),
    "nothing": lambda: torch.zeros(T, T, dtype=torch.bool),
    "last queries blind": lambda: (KEY <= QUERY) & (QUERY < 120),
}
# Two runs, runs that move back, other masks for other heads, holes in one row only.
OTHERS: dict[str, Callable[[], Tensor]] = {
    "anti-causal start": lambda: KEY < 150 - QUERY,
    "two runs": lambda: (KEY < 10) | ((KEY > 30) & (KEY <= QUERY)),
    "per head": lambda: torch.stack([KEY <= QUERY, (KEY <= QUERY) & (KEY % 3 != 1)])[None],
    "one hole": lambda: (KEY <= QUERY) & ~((QUERY == 149) & (KEY == 148)),
    "blind, then from the start": lambda: (KEY <= QUERY) & ((QUERY < 60) | (QUERY > 80)),
}


def qkv(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(2, 2, T, 24).to(dtype).requires_grad_() for _ in "qkv"]


def as_added(mask: Tensor, hidden: float, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


@pytest.mark.parametrize("name", [*RUNS, *OTHERS])
def test_values_and_gradients(name: str, cpu_isa: str) -> None:
    mask = (RUNS | OTHERS)[name]()
    for dtype in DTYPES:
        inputs = qkv(dtype)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        dout = torch.randn(2, 2, T, 24).to(dtype)
        expected = ops.attention(*exact, causal=False, mask=mask, backend="torch")
        gradients = torch.autograd.grad(expected, exact, dout.double())
        tolerance = 2e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        given = {
            "bool": mask,
            "-inf": as_added(mask, -torch.inf, torch.float32),
            "lowest": as_added(mask, torch.finfo(dtype).min, dtype),
        }
        for kind, form in given.items():
            found = ops.attention(*inputs, causal=False, mask=form, backend="cpu")
            assert relative_error(found, expected) <= tolerance, kind
            for f, e in zip(torch.autograd.grad(found, inputs, dout), gradients, strict=True):
                assert relative_error(f, e) <= 2 * tolerance, kind


def test_a_mask_of_runs_costs_what_causality_costs(cpu_isa: str) -> None:
    # Bit for bit the causal result: a mask that is applied rounds scores once more.
    for dtype in DTYPES:
        q, k, v = (t.detach() for t in qkv(dtype))
        mask = RUNS["causal"]()
        for form in (mask, as_added(mask, -torch.inf, dtype), mask.expand(2, 1, T, T)):
            found = ops.attention(q, k, v, causal=False, mask=form, backend="cpu")
            assert torch.equal(found, ops.attention(q, k, v, backend="cpu"))
        found = ops.attention(q[:, :, -1:], k, v, causal=False, mask=mask[-1:], backend="cpu")
        assert torch.equal(found, ops.attention(q[:, :, -1:], k, v, backend="cpu"))


def test_masks_join_the_other_limits(cpu_isa: str) -> None:
    q, k, v = (t.detach() for t in qkv(torch.float32))
    lengths = torch.tensor([150, 90])
    for name in ("band", "padding, per row", "documents"):
        options = {"mask": RUNS[name](), "window": 25, "lengths": lengths, "q_offset": 0}
        found = ops.attention(q, k, v, **options, backend="cpu")
        exact = ops.attention(q.double(), k.double(), v.double(), **options, backend="torch")
        assert relative_error(found, exact) <= 2e-6


def test_masks_with_odd_strides(cpu_isa: str) -> None:
    q, k, v = (t.detach() for t in qkv(torch.float32))
    mask = RUNS["band"]()
    expected = ops.attention(q, k, v, causal=False, mask=mask, backend="cpu")
    for form in (mask.t().contiguous().t(), torch.stack((mask, ~mask), -1)[..., 0]):
        found = ops.attention(q, k, v, causal=False, mask=form, backend="cpu")
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_masks_of_no_queries_or_no_keys() -> None:
    for b, h, t, keys in ((2, 2, 0, 7), (2, 2, 3, 0), (0, 2, 3, 7), (2, 0, 3, 7)):
        for shape in ((keys,), (1, keys), (t, keys), (b, 1, 1, keys), (1, h, t, keys)):
            for mask in (torch.ones(shape, dtype=torch.bool), torch.randn(shape)):
                q, k, v = (torch.randn(b, max(h, 1), n, 8) for n in (t, keys, keys))
                q, k, v = (x.requires_grad_() for x in (q, k, v))
                out = ops.attention(q[:, :h], k, v, mask=mask, backend="cpu")
                assert out.shape == (b, h, t, 8)
                assert (out == 0).all()
                for grad in torch.autograd.grad(out.sum(), (q, k, v)):
                    assert (grad == 0).all()


@pytest.mark.parametrize("t", [1, 5, 70])
def test_nan_in_a_mask_or_a_slope_shows(t: int, cpu_isa: str) -> None:
    """NaN at a key that a query sees makes the query's row NaN, as adding it to the scores does."""
    for dtype in DTYPES:
        q, k, v = (torch.randn(1, 2, n, 16).to(dtype).requires_grad_() for n in (t, 80, 80))
        mask = torch.randn(t, 80).to(dtype)
        mask[0, 3] = torch.nan  # seen
        mask[-1, 5] = -torch.inf
        if t > 1:
            mask[1, 79] = torch.nan  # behind the causal limit
        slopes = torch.tensor([torch.nan, 0.5])
        for options in ({"mask": mask}, {"alibi": slopes}, {"mask": mask[:, :], "alibi": slopes}):
            found, expected = (
                ops.attention(q, k, v, **options, backend=backend) for backend in ("cpu", "torch")
            )
            assert found.isnan().any()
            assert torch.equal(found.isnan(), expected.isnan())
            torch.testing.assert_close(
                found, expected, atol=4 * torch.finfo(dtype).eps, rtol=1e-5, equal_nan=True
            )
            dout = torch.ones_like(found)
            (dq,) = torch.autograd.grad(found, q, dout)
            (expected_dq,) = torch.autograd.grad(expected, q, dout)
            assert torch.equal(dq.isnan(), expected_dq.isnan())


@pytest.mark.parametrize("t", [1, 5, 70])
def test_finite_masks_of_any_size(t: int, cpu_isa: str) -> None:
    """Only -inf and the lowest number hide; numbers near them are scores like any other."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(1, 2, n, 16).to(dtype).requires_grad_() for n in (t, 80, 80)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        one_higher = torch.full((t, 80), -3e38)
        one_higher[:, 7] = -2.9e38
        halves = torch.full((t, 80), -3e38)
        halves[:, 40:] = 3e38
        mixed = torch.zeros(t, 80)
        mixed[:, ::3], mixed[0] = -3e38, -1e30
        for mask in (torch.full((t, 80), -3e38), one_higher, halves, mixed, mixed * 0 - 1e9):
            found = ops.attention(*inputs, causal=False, mask=mask, backend="cpu")
            expected = ops.attention(*exact, causal=False, mask=mask, backend="torch")
            if mask.max() < -1e8:  # beside 1e9, 64 is the last place of fp32: the score is lost
                expected = attend_alone(exact, mask)
            gradients = torch.autograd.grad(expected, exact, torch.ones_like(expected))
            tolerance = 2e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
            assert relative_error(found, expected) <= tolerance
            for f, e in zip(
                torch.autograd.grad(found, inputs, torch.ones_like(found)), gradients, strict=True
            ):
                scale = e.abs().max().clamp_min(1)
                assert ((f.double() - e).abs().max() / scale) <= 4 * tolerance


def attend_alone(inputs: list[Tensor], mask: Tensor) -> Tensor:
    """Attention by the mask alone, as it is where it swallows the scores; their gradients stay."""
    q, k, v = inputs
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(mask.double() + (scores - scores.detach()), -1) @ v
