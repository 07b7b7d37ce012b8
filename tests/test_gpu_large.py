"""Tensors of more than 2^31 and 2^32 elements on the GPU: offsets are 64 bits. Skipped without one.

Only ends are compared, with the reference on those parts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lmfast
from lmfast.testing import assert_within_error_rule

pytestmark = pytest.mark.gpu

ENDS = (slice(0, 5), slice(-5, None))


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def ends_of_noise(*shape: int, pad: int = 0) -> Tensor:
    """Zeros with random numbers in the first and last rows; rows further apart by `pad`."""
    x = torch.zeros(*shape[:-1], shape[-1] + pad, device="cuda", dtype=torch.bfloat16)
    x = x[..., : shape[-1]]
    for rows in ENDS:
        x[rows].normal_()
    return x


def check_ends(value: Tensor, reference: Any, *inputs: Tensor) -> None:
    for rows in ENDS:
        some = [t[rows] for t in inputs]
        plain, exact = reference(*some), reference(*(t.double() for t in some))
        assert_within_error_rule(value[rows], plain, exact)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_norm_of_more_than_two_to_the_32(backend: str) -> None:
    x = ends_of_noise(2**20 + 3, 4096, pad=8)
    y = lmfast.ops.rms_norm(x, backend=backend)
    check_ends(y, lambda x: lmfast.ops.rms_norm(x, backend="torch"), x)


def test_gated_units_of_more_than_two_to_the_32() -> None:
    gate, up = (ends_of_noise(2**20 + 3, 4096) for _ in range(2))
    y = lmfast.ops.swiglu(gate, up, backend="triton")
    check_ends(y, lambda g, u: lmfast.ops.swiglu(g, u, backend="torch"), gate, up)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rotation_of_more_than_two_to_the_32(backend: str) -> None:
    steps = 2**20 + 3
    q = ends_of_noise(steps, 32, 128).transpose(0, 1)[None]  # tokens before heads
    k = q[:, :2]
    cos, sin = lmfast.ops.rope_tables(steps, 128, device="cuda")
    found = lmfast.ops.rope(q, k, cos, sin, backend=backend)
    for first in (0, steps - 5):
        part = q[:, :, first : first + 5], k[:, :, first : first + 5]
        options: dict[str, Any] = {"positions": first, "backend": "torch"}
        plain = lmfast.ops.rope(*part, cos, sin, **options)
        exact = lmfast.ops.rope(*(t.double() for t in part), cos, sin, **options)
        for value, p, e in zip(found, plain, exact, strict=True):
            assert_within_error_rule(value[:, :, first : first + 5], p, e)


def test_losses_of_more_than_two_to_the_32_logits() -> None:
    logits = ends_of_noise(2**15 + 9, 2**17).requires_grad_()
    targets = torch.randint(2**17, (len(logits),), device="cuda")
    loss = lmfast.ops.cross_entropy(logits, targets, reduction="none", backend="triton")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    for rows in ENDS:
        found = []
        for dtype in (torch.bfloat16, torch.float64):
            some = logits[rows].detach().to(dtype).requires_grad_()
            part = lmfast.ops.cross_entropy(some, targets[rows], reduction="none", backend="torch")
            found.append((part.detach(), *torch.autograd.grad(part.sum(), some)))
        for value, plain, exact in zip((loss[rows], grad[rows]), *found, strict=True):
            assert_within_error_rule(value, plain, exact)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_cache_of_more_than_two_to_the_31_elements(backend: str) -> None:
    """A window on its end: reached only past the 32-bit offsets."""
    capacity = 2**21 + 70
    keys = torch.empty(1, 8, capacity, 128, device="cuda", dtype=torch.bfloat16)
    values = torch.empty_like(keys)
    for t in (keys, values):
        t[:, :, -200:].normal_()
    q = torch.randn(1, 16, 1, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([capacity - 3], device="cuda")
    found = lmfast.ops.cached_attention(q, keys, values, lengths, window=90, backend=backend)
    part = (t[:, :, -200:-3] for t in (keys, values))
    exact = lmfast.ops.attention(*(t.double() for t in (q, *part)), window=90, backend="torch")
    part = (t[:, :, -200:-3] for t in (keys, values))
    plain = lmfast.ops.attention(q, *part, window=90, backend="torch")
    # Weights are rounded to the dtype on the way into the matrix units: op_checks.
    error, allowed = (found - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 1.5 * 1.45 * allowed + torch.finfo(q.dtype).eps * exact.abs().max()
