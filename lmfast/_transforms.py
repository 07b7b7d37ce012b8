"""Transformations of a call that kernels have no rule for, and plain PyTorch has.

The kernels compute no tangents, and an operator or ``torch.autograd.Function`` without a rule for
them drops those of its inputs, which reads as a derivative of zero. ``torch.func.vmap`` calls an
operator without a rule once per element, and refuses a function that records gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether one of torch.func's transforms is active."""
    return torch._C._are_functorch_transforms_active()


def transform_of(*values: Any) -> str | None:
    """What transforms a call with these arguments, or may: vmap or forward mode; else None.

    Outside of both this reads two numbers: 0.1 us.
    """
    active = in_transform()
    if torch.compiler.is_compiling():
        # Nobody can ask for the levels there, nor does a tensor then say that it has a gradient.
        return "torch.func" if active else _forward_mode(active, values)
    if active and any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()):
        return "torch.func.vmap"
    return _forward_mode(active, values)


def _forward_mode(active: bool, values: tuple[Any, ...]) -> str | None:
    if forward_ad._current_level < 0:
        return None
    # Inside torch.func the tangent may lie below the wrapper of another transform.
    if active or any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in values
    ):
        return "forward-mode differentiation"
    return None
