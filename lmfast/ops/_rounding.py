"""Matrices as integers, by rounding every number for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[8, 4]
INT4_GROUP = 32
_CLIPS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79)


@dataclass(frozen=True, eq=False)
class Quantised:
    """Integers in the place of a matrix: ``weight[n, k] = codes[n, k] * scale``.

    Attributes:
        codes: (N, K) int8, from -127 to 127, or from -8 to 7 with 4 bits.
        scales: (N,) float32, or with groups (N, K / group) float16.
        bits: 8 or 4.
        group: numbers of a row that share a scale; None: all.
    """

    codes: Tensor
    scales: Tensor
    bits: Bits
    group: int | None = None

    def dequantised(self) -> Tensor:
        """The matrix (N, K) in float32."""
        codes = self.codes.float()
        if self.group is None:
            return codes * self.scales[:, None]
        return codes * self.scales.float().repeat_interleave(self.group, 1)


def quantise_rows(weight: Tensor) -> Quantised:
    """int8 with one scale per row: round to nearest, the largest magnitude at 127."""
    w = weight.detach().float()
    scales = _finite(w.abs().amax(1) / 127)
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    codes = (w * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Quantised(codes, scales, 8)


def quantise_groups(weight: Tensor, group: int = INT4_GROUP, bits: Bits = 4) -> Quantised:
    """Integers with one float16 scale per group of a row, round to nearest.

    A row is filled up with zeros to whole groups.
    """
    w = weight.detach().float()
    rows, depth = w.shape
    w = torch.nn.functional.pad(w, (0, -depth % group)).view(rows, -(-depth // group), group)
    scales = group_scales(w, bits)
    return Quantised(nearest(w, scales[..., None], bits).flatten(1), scales, bits, group)


def group_scales(w: Tensor, bits: Bits, importance: Tensor | None = None) -> Tensor:
    """The scale of every group, float16.

    With 8 bits the largest magnitude is at 127. With 4 bits, of eight candidates, which put the
    number of the largest magnitude at -8, exactly or clipped by up to a fifth, the one of least
    squared error.

    Args:
        w: (..., group) float32.
        importance: (group,) or like `w`, what the square of an error counts; None: all the same.
    """
    if bits == 8:
        return _finite((w.abs().amax(-1) / 127).half())
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    _finite((extreme / 8).half())
    best = torch.full_like(extreme, torch.inf)
    scales = torch.zeros_like(extreme, dtype=torch.float16)
    for clip in _CLIPS:
        scale = (extreme * (clip / -8)).half()
        error = nearest(w, scale[..., None], bits).float().mul_(scale.float()[..., None]).sub_(w)
        error.square_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        scales = torch.where(better, scale, scales)
    return scales


def _finite(scales: Tensor) -> Tensor:
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            "weights must be finite to be rounded to integers, and those of groups small enough "
            "for a float16 scale: a matrix of the model has others"
        )
    return scales


def nearest(w: Tensor, scale: Tensor, bits: Bits) -> Tensor:
    """The codes nearest to w / scale, int8."""
    scale = scale.float()
    lowest, highest = (-8, 7) if bits == 4 else (-127, 127)
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    return (w * inverse).round_().clamp_(lowest, highest).to(torch.int8)
