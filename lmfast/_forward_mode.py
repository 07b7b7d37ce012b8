"""Forward-mode differentiation: whether a call takes part in it.

The kernels compute no tangents, and an operator or ``torch.autograd.Function`` without a rule for
them drops those of its inputs, which reads as a derivative of zero. Plain PyTorch has the rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*values: Any) -> bool:
    """Whether one of these is a tensor with a tangent, or may be one.

    Outside ``torch.func.jvp`` and ``forward_ad.dual_level()`` this reads one number: 0.1 us.
    """
    if forward_ad._current_level < 0:
        return False
    if torch._C._are_functorch_transforms_active():
        return True  # the tangent may lie below the wrapper of another transform
    return any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in values
    )
