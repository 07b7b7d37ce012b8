"""Registers the CUDA C++ kernels: the operators of the CPU, chosen by their arguments' device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lmfast.ops.add_rms_norm
import lmfast.ops.cached_attention  # noqa: F401  (these register the ops extended below)
from lmfast import _extension
from lmfast._dispatch import implementation, register
from lmfast.ops._cached_attention_reference import CacheOptions
from lmfast.ops._storage import FLOAT8
from lmfast.ops.decode_attention import launch as launch_decode_attention
from lmfast.ops.rope import unsupported_by_kernels as rope_unsupported_by

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


def _rope_unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> str | None:
    reason = rope_unsupported_by(q, k, cos, sin, *options)
    return reason or unsupported(q, k, cos, sin)


# Query rows per key head, tokens x heads of a group: with more, the matrix units win (Triton). Two
# blocks share the keys where tokens are appended; the second reads from L2 what fits there.
_MAX_CACHE_ROWS, _MAX_APPEND_ROWS = 4, 8
_SHARED_KEYS = 32 << 20  # bytes of keys and values, beside the weights of a layer; estimated


def _rows_per_key_head(q: Tensor, keys: Tensor) -> int:
    return q.shape[2] * (q.shape[1] // keys.shape[1])


def _cached_unsupported(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *options: Any,
    most_rows: int = _MAX_CACHE_ROWS,
) -> str | None:
    rows = _rows_per_key_head(q, keys)
    if rows > most_rows:
        return (
            f"{rows} query rows per key head (tokens x heads of a group); the kernel takes up to "
            f"{most_rows}"
        )
    if q.shape[3] > 256:
        return f"the kernel takes head sizes to 256, got {q.shape[3]}"
    if keys.dtype not in (q.dtype, torch.int8, FLOAT8):
        return f"no CUDA kernel for {q.dtype} queries on {keys.dtype} storage"
    o = CacheOptions(*options)
    for t in (keys, values, o.key_scales, o.value_scales):
        if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
            return "keys, values and scales need last dimensions that are neighbours in memory"
    return unsupported(q, o.sinks, o.alibi)


def _decode_unsupported(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    keys, values, lengths, cos, sin, _, *options = rest
    reason = _cached_unsupported(
        q, keys, values, lengths, *options, most_rows=_MAX_APPEND_ROWS
    ) or unsupported(k, v, cos, sin)
    size = 2 * keys.shape[2] * k.shape[0] * k.shape[1] * k.shape[3] * keys.element_size()
    rows = _rows_per_key_head(q, keys)
    if reason is None and rows > _MAX_CACHE_ROWS and size > _SHARED_KEYS:
        return (
            f"{rows} query rows per key head are two readings of the keys and values: above "
            f"{_SHARED_KEYS >> 20} MB of them one reading is faster"
        )
    return reason


for _name, _supports in (
    ("cached_attention", _cached_unsupported),
    ("rms_norm", lambda x, weight, eps: _norm_unsupported(x, weight)),
    ("add_rms_norm", lambda x, residual, weight, eps: _norm_unsupported(x, weight)),
    ("rope", _rope_unsupported),
):
    _same = implementation(_name, "cpu")
    register(_name, "cuda", ("cuda",), _same.forward, _same.backward, _supports)
register("decode_attention", "cuda", ("cuda",), launch_decode_attention, None, _decode_unsupported)
