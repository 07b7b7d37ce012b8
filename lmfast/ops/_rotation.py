"""What the ops that rotate share: checks of tables and positions, and the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfast.ops._library import accumulation_dtype, check_same_device, is_readable


def check_tables(cos: Tensor, sin: Tensor, x: Tensor) -> torch.dtype:
    """The dtype of the tables that rotate ``x``; TypeError or ValueError if they cannot."""
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            "cos and sin must both have shape (L, D_rot / 2), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    table = torch.promote_types(cos.dtype, sin.dtype)
    if table not in (torch.float32, accumulation_dtype(x.dtype)):
        raise TypeError(
            f"cos and sin must be float32 (or float64 with float64 q), got {cos.dtype}: "
            "positions above 256 lose their phase in half precision"
        )
    if 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(
            f"the tables rotate {2 * cos.shape[1]} dimensions, but the head size is {x.shape[3]}"
        )
    return table


def check_positions(
    positions: int | Tensor | None, q: Tensor, rows: int
) -> tuple[Tensor | None, int]:
    """(tensor or None, offset of the first token)."""
    batch, length = q.shape[0], q.shape[2]
    if isinstance(positions, Tensor):
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise TypeError(f"positions must be integers, got {positions.dtype}")
        if positions.shape not in ((batch,), (batch, length)):
            raise ValueError(
                f"positions must have shape (B,) = ({batch},) or (B, T) = ({batch}, {length}), "
                f"got {tuple(positions.shape)}"
            )
        check_same_device("positions", positions, "q", q)
        if positions.numel() and is_readable(positions):
            past = length - 1 if positions.dim() == 1 else 0
            _check_range(int(positions.min()), int(positions.max()) + past, rows)
        return positions.to(torch.int64), 0
    offset = 0 if positions is None else positions
    if isinstance(offset, (bool, float)):
        raise TypeError(f"positions must be an int or an integer tensor, got {offset!r}")
    if batch and length:
        _check_range(offset, offset + length - 1, rows)
    return None, offset


def _check_range(lowest: int, highest: int, rows: int) -> None:
    if lowest < 0 or highest >= rows:
        raise ValueError(
            f"positions reach from {lowest} to {highest}, but cos and sin have rows for 0 to "
            f"{rows - 1}; build longer tables with rope_tables(length, ...)"
        )


def angles(
    cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, length: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token, (B or 1, 1, T, D_rot / 2)."""
    steps = torch.arange(length, device=cos.device)
    if positions is None:
        rows = (offset + steps)[None]  # [1, T]
    else:
        rows = positions[:, None] + steps if positions.dim() == 1 else positions  # [B, T]
    return cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x`` (B, H, T, D) rotated, in its dtype; dimensions behind the tables' pass through."""
    rotary = 2 * cos.shape[-1]
    h = x[..., :rotary].to(accumulation_dtype(x.dtype))
    a, b = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    first, second = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        out = torch.stack((first, second), -1).flatten(-2)
    else:
        out = torch.cat((first, second), -1)
    return torch.cat((out.to(x.dtype), x[..., rotary:]), -1)
