"""Bounds on gradients, without waiting for the device they are on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def clip_gradients(
    parameters: Sequence[nn.Parameter], *, norm: float | None = None, value: float | None = None
) -> Tensor | None:
    """Bound each number of the gradients, then their norm all together, in place.

        g = min(max(g, -value), value);   g = g min(1, norm / |g|)

    Args:
        parameters: those without a gradient are left out. Sparse gradients, as an `Embedding` has
            on request, are summed up and stay sparse; sharded ones stay sharded.
        norm, value: None = no bound.

    Returns:
        The norm before it was bounded, on the gradients' device; None without `norm`.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -9.0])
        >>> clip_gradients([weight], value=4.0, norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([ 0.6000, -0.8000])
    """
    given = [p for p in parameters if p.grad is not None]
    sparse = [p for p in given if p.grad is not None and p.grad.is_sparse]
    if not sparse:
        if value is not None:
            nn.utils.clip_grad_value_(given, value)
        return None if norm is None else nn.utils.clip_grad_norm_(given, norm)
    for p in sparse:
        assert p.grad is not None
        p.grad = p.grad.coalesce()  # a row that was used twice has one gradient
    numbers = [
        p.grad._values() if p.grad.is_sparse else p.grad for p in given if p.grad is not None
    ]
    with torch.no_grad():
        if value is not None:
            for t in numbers:
                t.clamp_(-value, value)
        if norm is None:
            return None
        total = nn.utils.get_total_norm(numbers)
        # As PyTorch's own: a division that never is by zero.
        factor = (norm / (total + 1e-6)).clamp_(max=1.0)
        for t in numbers:
            t.mul_(factor.to(t.device))
    return total
