"""The torch library that holds every operator's schema, and what all ops share.

Schemas and fake functions are defined here in Python, so they exist without a compiler; C++ and
Triton only add implementations. Autograd is a ``torch.autograd.Function`` around forward and
backward operators: measured cheaper than ``register_autograd`` and invisible to inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lmfast import _extension
from lmfast._dispatch import is_requested
from lmfast._transforms import transform_of

LIBRARY = torch.library.Library("lmfast", "DEF")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def define(schema: str, fake: Callable[..., Any]) -> Any:
    """Defines ``lmfast::<schema>`` with its fake function; returns the callable overload."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    torch.library.register_fake(f"lmfast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.lmfast, name).default


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call with these tensors, or another transform take it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return transform_of(*tensors) is not None


def may_run_at_once(op: str, backend: str | None) -> bool:
    """Whether a call may be tried on the C++ operator before its arguments are looked at.

    One token's work takes a microsecond or ten, and so do the checks and the choice of a backend.
    The operators have their own checks, for memory's sake: only a call that they refuse, or that
    autograd records, goes the long way, where the argument is named that does not fit.
    """
    return (
        not torch.compiler.is_compiling()
        and backend is None
        and _extension.cpu.loaded
        and not is_requested(op)
    )


def on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all tensors are on the CPU; AttributeError for what is no tensor."""
    for t in tensors:
        if t is not None and not t.is_cpu:
            return False
    return True


# What an operator or the conditions before it raise for arguments that do not fit.
REFUSALS = (RuntimeError, TypeError, AttributeError)


def unsupported_by_cpu_kernels(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels cannot take these tensors, or None."""
    if not _extension.cpu.loaded:
        return _extension.cpu.reason
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in KERNEL_DTYPES:
            return f"no kernel for {t.dtype}"
        if t.layout != torch.strided:
            return f"no kernel for layout {t.layout}"
    return None


def with_unit_last_stride(t: Tensor) -> Tensor:
    """``t``, copied only when neighbours in its last dimension are not neighbours in memory."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def check_tensor(name: str, value: object) -> Tensor:
    """``value`` if it is a floating-point tensor; else TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    return value


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device {other.device}, got {value.device}"
        )


def is_autocast(value: Tensor) -> bool:
    """Whether autocast chooses dtypes on this tensor's device, which may be "meta"."""
    return not value.is_meta and torch.is_autocast_enabled(value.device.type)


def is_readable(value: Tensor) -> bool:
    """Whether a check may look at the numbers of a tensor.

    On a GPU it would have to wait for the device, in a graph the graph would depend on them, and
    inside a transform or with FakeTensors there are none.
    """
    return (
        value.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not isinstance(value, FakeTensor)
    )


def check_range(name: str, value: Tensor, past: int) -> None:
    """ValueError unless every number of a tensor lies in 0..past - 1, where it ``is_readable``."""
    if value.numel() == 0 or not is_readable(value):
        return
    lowest, highest = int(value.min()), int(value.max())
    if lowest < 0 or highest >= past:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{name} must lie in 0..{past - 1}, got {wrong}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
