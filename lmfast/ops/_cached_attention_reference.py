"""Attention over a cache in plain PyTorch: the contract, and the way there for other backends.

Storage is brought into the form ``attention`` takes, so that one formula serves both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmfast.ops import _attention_reference as dense
from lmfast.ops._attention_reference import Options
from lmfast.ops._library import accumulation_dtype

# Keys that one entry of a table stands for.
TABLE_BLOCK = 64


class CacheOptions(NamedTuple):
    """What ``cached_attention`` takes besides its tensors of values; the order of the operator."""

    table: Tensor | None  # (B, ceil(C / 64)) int32
    key_scales: Tensor | None  # (R, Hkv, C)
    value_scales: Tensor | None  # (R, Hkv, C)
    window: int  # 0: none
    softcap: float  # 0: none
    sinks: Tensor | None  # (H,)
    alibi: Tensor | None  # (H,)
    scale: float


def attention_options(lengths: Tensor, o: CacheOptions) -> Options:
    """The same options for ``attention``."""
    return Options(
        causal=True,
        offset=None,
        offsets=None,
        lengths=lengths,
        mask=None,
        window=o.window,
        softcap=o.softcap,
        sinks=o.sinks,
        alibi=o.alibi,
        scale=o.scale,
    )


def by_batch_row(stored: Tensor, table: Tensor | None, lengths: Tensor) -> Tensor:
    """(B, Hkv, C, ...): what each batch row finds in (R, Hkv, C, ...), a copy if by a table."""
    if table is None:
        return stored
    heads, capacity = stored.shape[1:3]
    column = torch.arange(capacity, device=stored.device)
    row = table.long()[:, column // TABLE_BLOCK]  # (B, C)
    # Entries of blocks behind a row's keys mean nothing; any row that exists will do.
    row = row.masked_fill(column >= lengths[:, None], 0)
    head = torch.arange(heads, device=stored.device)[:, None]
    return stored[row[:, None], head, column]


def dequantised(stored: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values in ``dtype``: int8 times the scale of its position."""
    return stored.to(dtype) if scales is None else stored.to(dtype) * scales[..., None].to(dtype)


def shortened(
    keys: Tensor, values: Tensor, o: CacheOptions, longest: int
) -> tuple[Tensor, Tensor, CacheOptions]:
    """The same call on views of the first ``longest`` keys, all that any row has."""
    scales = (None if s is None else s[:, :, :longest] for s in (o.key_scales, o.value_scales))
    table = None if o.table is None else o.table[:, : -(-longest // TABLE_BLOCK)]
    key_scales, value_scales = scales
    o = o._replace(table=table, key_scales=key_scales, value_scales=value_scales)
    return keys[:, :, :longest], values[:, :, :longest], o


def _dense_arguments(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    options: tuple[Any, ...],
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    o = CacheOptions(*options)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        # On a GPU reading the lengths would wait for it; `KVCache` knows them, and does the same.
        keys, values, o = shortened(keys, values, o, int(lengths.max()) if len(lengths) else 0)
    k, v = (
        by_batch_row(dequantised(stored, scales, accumulation_dtype(q.dtype)), o.table, lengths)
        for stored, scales in ((keys, o.key_scales), (values, o.value_scales))
    )
    return q, k.to(dtype), v.to(dtype), *attention_options(lengths, o)


def reference(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *options: Any) -> Tensor:
    """softmax(scale q k^T + ...) v over each row's keys, as ``cached_attention`` defines it."""
    dtype = accumulation_dtype(q.dtype)
    return dense.reference(*_dense_arguments(q, keys, values, lengths, options, dtype))


def peer(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *options: Any) -> Tensor:
    """The same by PyTorch's own operator, on keys and values in q's dtype."""
    return dense.peer(*_dense_arguments(q, keys, values, lengths, options, q.dtype))
