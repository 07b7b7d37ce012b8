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
