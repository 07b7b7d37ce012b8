"""What ``cached_attention`` accepts: every argument checked by name and brought into one form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmfast.ops._attention_arguments import (
    check_heads,
    check_lengths,
    check_scale,
    check_softcap,
    check_window,
)
from lmfast.ops._cached_attention_reference import TABLE_BLOCK, CacheOptions
from lmfast.ops._library import (
    check_range,
    check_same_device,
    check_tensor,
    is_readable,
    needs_grad,
)
from lmfast.ops._storage import STORAGE_DTYPES, STORAGE_NAMES


def _check_query(q: object) -> Tensor:
    q = check_tensor("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, H, T, D), got {tuple(q.shape)}")
    return q


def _check_stored(name: str, value: object, q: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{name} must be {STORAGE_NAMES}, got {value.dtype}")
    if value.dim() != 4 or value.shape[3] != q.shape[3]:
        raise ValueError(
            f"{name} must have shape (R, Hkv, C, {q.shape[3]}), with q's head size, "
            f"got {tuple(value.shape)}"
        )
    check_same_device(name, value, "q", q)
    return value


def _check_storage(q: Tensor, keys: object, values: object) -> tuple[Tensor, Tensor]:
    keys, values = _check_stored("keys", keys, q), _check_stored("values", values, q)
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys and values must have one shape and dtype, got {tuple(keys.shape)} {keys.dtype} "
            f"and {tuple(values.shape)} {values.dtype}"
        )
    if keys.shape[1] == 0 or q.shape[1] % keys.shape[1] != 0:
        raise ValueError(
            f"the {q.shape[1]} heads of q must be a multiple of the {keys.shape[1]} heads of keys"
        )
    return keys, values


def _check_table(table: object, q: Tensor, keys: Tensor) -> Tensor | None:
    if table is None:
        if keys.shape[0] != q.shape[0]:
            raise ValueError(
                f"keys must have q's {q.shape[0]} rows where there is no table, got {keys.shape[0]}"
            )
        return None
    if not isinstance(table, Tensor) or table.dtype != torch.int32:
        kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"table must be an int32 tensor, got {kind}")
    shape = (q.shape[0], -(-keys.shape[2] // TABLE_BLOCK))
    if table.shape != shape:
        raise ValueError(
            f"table must have shape (B, ceil(C / {TABLE_BLOCK})) = {shape}, "
            f"got {tuple(table.shape)}"
        )
    check_same_device("table", table, "q", q)
    return table


def _check_scales(name: str, scales: object, keys: Tensor) -> Tensor | None:
    if keys.dtype != torch.int8:
        if scales is not None:
            raise ValueError(f"{name} is for int8 storage, but keys and values are {keys.dtype}")
        return None
    if scales is None:
        raise ValueError(f"{name} is required for int8 storage")
    scales = check_tensor(name, scales)
    # float64 is for comparisons in float64.
    if scales.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32, got {scales.dtype}")
    if scales.shape != keys.shape[:3]:
        raise ValueError(
            f"{name} must have shape (R, Hkv, C) = {tuple(keys.shape[:3])}, "
            f"got {tuple(scales.shape)}"
        )
    check_same_device(name, scales, "keys", keys)
    return scales


def check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    table: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """(q, keys, values, lengths, *CacheOptions) from the public arguments."""
    q = _check_query(q)
    keys, values = _check_storage(q, keys, values)
    options = CacheOptions(
        table=_check_table(table, q, keys),
        key_scales=_check_scales("key_scales", key_scales, keys),
        value_scales=_check_scales("value_scales", value_scales, keys),
        window=check_window(window),
        softcap=check_softcap(softcap),
        sinks=check_heads("sinks", sinks, q),
        alibi=check_heads("alibi", alibi, q),
        scale=check_scale(scale, q.shape[3]),
    )
    if needs_grad(q, keys, values, options.key_scales, options.value_scales, sinks, alibi):
        raise ValueError(
            "cached_attention has no gradient, and one of its tensors requires one: call it under "
            "torch.no_grad(), or use lmfast.ops.attention for training"
        )
    rows = check_lengths(lengths, q, keys.shape[2])
    # On a GPU even what is looked at would be four kernels.
    if options.table is not None and is_readable(options.table):
        # Entries behind a row's keys are not read, and may be anything.
        first = torch.arange(options.table.shape[1], device=q.device) * TABLE_BLOCK
        used = first < rows[:, None]
        check_range("table", options.table.masked_fill(~used, 0), max(1, keys.shape[0]))
    return q, keys, values, rows, *options
