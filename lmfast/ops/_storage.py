"""What keys and values are stored as in a cache, and how they are rounded to it."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
STORAGE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    FLOAT8,
)
STORAGE_NAMES = "float32, bfloat16, float16, float64, int8 or float8_e4m3fn"
_LARGEST_FLOAT8 = 448.0


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a storage dtype without scales.

    float8_e4m3fn: to nearest, halves to even, finite numbers beyond 448 to 448, infinity to NaN.
    Releases of PyTorch differ in what their own conversion does beyond 448.
    """
    if dtype != FLOAT8:
        return x.to(dtype)
    known = x.isfinite()
    inside = x.clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
    if x.dtype == torch.float64:  # through float32 would be rounding twice
        step = torch.ldexp(torch.ones_like(x), inside.frexp().exponent.clamp_min(-5) - 4)
        inside = (inside / step).round() * step
    inside = inside.float().to(FLOAT8)
    # Of eight-bit floats only the bits can be chosen between.
    nan = torch.full_like(known, 0x7F, dtype=torch.uint8)
    return torch.where(known, inside.view(torch.uint8), nan).view(FLOAT8)
