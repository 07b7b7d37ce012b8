"""Causal attention of queries over a possibly longer run of keys: the one place that calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfast import ops


def is_causal_mask(mask: Tensor) -> bool:
    """Tell whether a square mask is lower-triangular ones, the causal mask itself.

    Only masks in host memory are read: looking into one on a GPU would wait for the device, so
    there the answer is False and the mask is applied as given. So it is in a compiled graph.
    """
    if torch.compiler.is_compiling() or mask.device.type != "cpu":
        return False
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    # Most others show it in their first column or row, and are then not read twice.
    if not mask[:, :1].all() or mask[:1, 1:].any():
        return False
    return torch.equal(mask != 0, torch.ones_like(mask, dtype=torch.bool).tril())


def as_visible(mask: Tensor) -> Tensor:
    """Return a mask as booleans, True at the keys that are seen.

    A floating-point mask is looked at, so that one that is meant to be added to the scores, 0 where
    a key is seen, is not taken for its opposite; on a GPU that waits for the device, and while
    compiling it is not done.

    Raises:
        ValueError: the mask has another number of dimensions, or holds fractions, negative or
            other numbers in floating point.
    """
    if mask.ndim not in (2, 3, 4):
        raise ValueError(f"mask must have 2, 3 or 4 dimensions, got {tuple(mask.shape)}")
    if mask.is_floating_point() and not torch.compiler.is_compiling():
        wrong = mask[(mask != 0) & (mask != 1)]
        if wrong.numel():
            raise ValueError(
                "a floating-point mask must hold only 1 (seen) and 0 (hidden), got "
                f"{wrong[0].item()}; of one that is added to the scores give mask == 0"
            )
    return mask.bool() if mask.ndim != 3 else mask.bool()[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention of T queries over S keys, causal unless a mask is given.

        out = softmax(q k^T / sqrt(D)) v over the keys j <= q_offset + i that query i sees

    Args:
        q: (B, H, T, D); k, v: (B, Hkv, S, D) with H a multiple of Hkv: query head h reads
            key/value head h // (H / Hkv).
        mask: (T, S), (B, T, S) or (B, H or 1, T, S), zero or False = hidden, in floating point
            only 0 and 1; replaces causality. A query that sees no key gives zeros.
        q_offset: absolute position of the first query, int or (B,) int64; S - T by default.
        window, softcap, scale: as in `lmfast.ops.attention`; with a mask, the window reaches as far
            forward as back.

    Returns:
        (B, H, T, D).

    Raises:
        ValueError: the mask has another number of dimensions, or is one to be added to the scores.
    """
    # One for the queries among themselves, with more keys before them, can only mean causality.
    whole = mask is not None and mask.shape[-1] == k.shape[2]
    if mask is None or (not (whole and q_offset is not None) and is_causal_mask(mask)):
        return ops.attention(
            q, k, v, q_offset=q_offset, window=window, softcap=softcap, scale=scale
        )
    return ops.attention(
        *(q, k, v),
        causal=False,
        q_offset=q_offset,
        mask=as_visible(mask),
        window=window,
        softcap=softcap,
        scale=scale,
    )
