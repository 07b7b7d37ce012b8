"""Registers the CUDA C++ kernels: the operators of the CPU, chosen by their arguments' device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lmfast.ops.add_rms_norm
import lmfast.ops.rope  # noqa: F401  (both register the ops extended below)
from lmfast import _extension
from lmfast._dispatch import implementation, register
from lmfast.ops._library import needs_grad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why the CUDA kernels cannot take these tensors, or None."""
    if not _extension.cuda.loaded:
        return _extension.cuda.reason
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in DTYPES:
            return f"no CUDA kernel for {t.dtype}"
        if t.layout != torch.strided:
            return f"no CUDA kernel for layout {t.layout}"
    return None


def _norm_unsupported(x: Tensor, weight: Tensor | None) -> str | None:
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return f"weight is {weight.dtype}; the kernel takes x's dtype {x.dtype} or float32"
    return unsupported(x, weight)


def _rope_unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> str | None:
    if needs_grad(cos, sin):
        return "cos or sin requires a gradient, which only the torch backend computes"
    inplace = rest[-1]
    if inplace and (q.stride(-1) != 1 or k.stride(-1) != 1) and q.shape[-1] > 1:
        return "in place needs head dimensions that are neighbours in memory"
    return unsupported(q, k, cos, sin)


for _name, _supports in (
    ("rms_norm", lambda x, weight, eps: _norm_unsupported(x, weight)),
    ("add_rms_norm", lambda x, residual, weight, eps: _norm_unsupported(x, weight)),
    ("rope", _rope_unsupported),
):
    _same = implementation(_name, "cpu")
    register(_name, "cuda", ("cuda",), _same.forward, _same.backward, _supports)
