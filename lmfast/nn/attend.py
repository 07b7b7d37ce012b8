"""Causal attention of queries over a possibly longer run of keys: the one place that calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfast import ops


def is_causal_mask(mask: Tensor) -> bool:
    """Tell whether a square mask is lower-triangular ones, the causal mask itself.

    Only masks in host memory are read: looking into one on a GPU would wait for the device, so
    there the answer is False and the mask is applied as given.
    """
    if mask.device.type != "cpu" or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    return torch.equal(mask != 0, torch.ones_like(mask, dtype=torch.bool).tril())


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
        mask: (T, S), (B, T, S) or (B, H or 1, T, S), zero or False = hidden; replaces causality. A
            query that sees no key gives zeros.
        q_offset: absolute position of the first query, int or (B,) int64; S - T by default.
        window, softcap, scale: as in `lmfast.ops.attention`.

    Returns:
        (B, H, T, D).

    Raises:
        ValueError: the mask has another number of dimensions.
    """
    # A mask for all keys is the operator's to recognise; one for the queries among themselves, with
    # more keys before them in a cache, can only mean causality.
    if mask is None or (mask.shape[-1] != k.shape[2] and is_causal_mask(mask)):
        return ops.attention(
            q, k, v, q_offset=q_offset, window=window, softcap=softcap, scale=scale
        )
    if mask.ndim not in (2, 3, 4):
        raise ValueError(f"mask must have 2, 3 or 4 dimensions, got {tuple(mask.shape)}")
    visible = mask.bool() if mask.ndim != 3 else mask.bool()[:, None]
    return ops.attention(
        q, k, v, causal=False, mask=visible, window=window, softcap=softcap, scale=scale
    )
