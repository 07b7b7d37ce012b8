"""What ``attention`` accepts: every argument checked by name and brought into one form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmfast.ops._attention_reference import Options
from lmfast.ops._library import check_range, check_same_device, check_tensor

# Positions and windows stay below, so that sums of both are no larger than an int64.
_FARTHEST = 2**61
_SOFTCAPS = (1e-30, 1e30)  # what float32 holds with room for the scale

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _check_qkv(q: object, k: object, v: object) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = check_tensor("q", q), check_tensor("k", k), check_tensor("v", v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (B, heads, length, head size), "
                f"got shape {tuple(t.shape)}"
            )
        if t.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {t.dtype}")
        check_same_device(name, t, "q", q)
    if k.shape != v.shape:
        raise ValueError(
            f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k must have q's batch and head size, ({q.shape[0]}, Hkv, S, {q.shape[3]}), "
            f"got {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"the {q.shape[1]} heads of q must be a multiple of the {k.shape[1]} heads of k and v"
        )
    return q, k, v


def check_rows(name: str, value: object, q: Tensor) -> Tensor:
    """(B,) int64 from a 0-d or (B,) tensor of integers."""
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {kind}")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != q.shape[0]):
        raise ValueError(
            f"{name} must have shape () or ({q.shape[0]},), one value per batch row, "
            f"got {tuple(value.shape)}"
        )
    check_same_device(name, value, "q", q)
    return value.to(torch.int64).expand(q.shape[0])


def check_heads(name: str, value: object, q: Tensor) -> Tensor | None:
    """``value`` if it has one number per query head, or is None."""
    if value is None:
        return None
    value = check_tensor(name, value)
    if value.shape != q.shape[1:2]:
        raise ValueError(
            f"{name} must have shape ({q.shape[1]},), one value per head, got {tuple(value.shape)}"
        )
    check_same_device(name, value, "q", q)
    return value


def _mask(mask: object, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"mask must be bool (True: the key is seen) or floating point (added to the scores), "
            f"got {mask.dtype}"
        )
    check_same_device("mask", mask, "q", q)
    shape = (*q.shape[:3], k.shape[2])
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask must be broadcastable to (B, H, T, S) = {shape}, got {tuple(mask.shape)}"
        ) from None


def check_positive(name: str, value: object, kind: type) -> Any:
    """``value`` as a positive int or float; 0 for None."""
    if value is None:
        return kind(0)
    numbers = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name} must be {kind.__name__} or None, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return kind(value)


def check_window(window: object) -> int:
    """``window``, at most what positions can be summed with; 0 for None."""
    return min(check_positive("window", window, int), _FARTHEST)


def check_softcap(softcap: object) -> float:
    """``softcap`` if the kernels' float32 can hold it; 0 for None."""
    value: float = check_positive("softcap", softcap, float)
    if softcap is not None and not _SOFTCAPS[0] <= value <= _SOFTCAPS[1]:
        raise ValueError(f"softcap must lie between 1e-30 and 1e30, got {softcap}")
    return value


def check_lengths(lengths: object, q: Tensor, keys: int) -> Tensor:
    """(B,) int64, none above the number of keys."""
    rows = check_rows("lengths", lengths, q)
    check_range("lengths", rows, keys + 1)
    return rows


def check_scale(scale: object, head_dim: int) -> float:
    """``scale``, or 1 / sqrt(D) for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim > 0 else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}")
    return float(scale)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    q_offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """(q, k, v, *Options) from the public arguments; TypeError or ValueError."""
    q, k, v = _check_qkv(q, k, v)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    offset, offsets = None, None
    if isinstance(q_offset, bool):
        raise TypeError("q_offset must be an int or a tensor of integers, got bool")
    if isinstance(q_offset, int):
        if abs(q_offset) > _FARTHEST:
            raise ValueError(f"q_offset must lie between -2**61 and 2**61, got {q_offset}")
        offset = q_offset
    elif q_offset is not None:
        offsets = check_rows("q_offset", q_offset, q)
    return (
        q,
        k,
        v,
        *Options(
            causal=causal,
            offset=offset,
            offsets=offsets,
            lengths=None if lengths is None else check_lengths(lengths, q, k.shape[2]),
            mask=_mask(mask, q, k),
            window=check_window(window),
            softcap=check_softcap(softcap),
            sinks=check_heads("sinks", sinks, q),
            alibi=check_heads("alibi", alibi, q),
            scale=check_scale(scale, q.shape[3]),
        ),
    )
