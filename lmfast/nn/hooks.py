"""Whether somebody wants to see a module's own call."""

from __future__ import annotations

from torch import nn


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the module's forward or backward."""
    backward = module._backward_hooks or module._backward_pre_hooks
    return has_forward_hooks(module) or bool(backward)
