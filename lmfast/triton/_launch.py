"""Registration of Triton operators without importing triton, and what their launchers share."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lmfast.ops._library import LIBRARY, define

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel can take these tensors, or None."""
    if _MISSING is not None:
        return _MISSING
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in DTYPES:
            return f"no Triton kernel for {t.dtype}"
        if t.layout != torch.strided:
            return f"no Triton kernel for layout {t.layout}"
    return None


def twin(name: str, module: str, fake: Callable[..., Any] | None = None) -> Any:
    """Defines ``lmfast::triton_<name>`` like ``lmfast::<name>``, run by ``<module>.<name>``.

    Args:
        name: of the op, and of the launcher.
        module: the file of this package that holds the launcher; imported at the first call.
        fake: its fake function, if it returns something else than ``lmfast::<name>`` does.

    Returns:
        The callable overload.
    """
    model = getattr(torch.ops.lmfast, name).default
    schema = str(model._schema).removeprefix("lmfast::")
    launcher: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not launcher:
            launcher.append(getattr(importlib.import_module(f"lmfast.triton.{module}"), name))
        return launcher[0](*args)

    op = define(f"triton_{schema}", fake or (lambda *args: model(*args)))
    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        LIBRARY.impl(f"triton_{name}", launch, key)
    return op


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU current: Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the interpreter, so that loops over programs are walked."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for n < 1."""
    return 1 << max(0, n - 1).bit_length()
