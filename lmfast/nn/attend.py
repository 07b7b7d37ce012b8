"""Causal attention of queries over a possibly longer run of keys: the one place that calls it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def is_causal_mask(mask: Tensor) -> bool:
    """Tell whether a square mask is lower-triangular ones, the causal mask itself.

    Only masks in host memory are read: looking into one on a GPU would wait for the device, so
    there the answer is False and the mask is applied as given.
    """
    if mask.device.type != "cpu" or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    return torch.equal(mask != 0, torch.ones_like(mask, dtype=torch.bool).tril())


def causal_mask(queries: int, keys: int, offset: int | Tensor, device: torch.device) -> Tensor:
    """Return the boolean mask "key j is visible to query i", j <= offset + i.

    Args:
        queries, keys: T and S.
        offset: absolute position of the first query, an int or (B,) int64.

    Returns:
        (T, S) for an int offset, (B, 1, T, S) for a tensor.
    """
    rows = torch.arange(queries, device=device)
    columns = torch.arange(keys, device=device)
    if isinstance(offset, Tensor):
        return columns <= (offset[:, None] + rows)[:, None, :, None]
    return columns <= (offset + rows)[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    q_offset: int | Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of T queries over S keys, causal unless a mask is given.

        out = softmax(q k^T / sqrt(D)) v over the keys j <= q_offset + i that query i sees

    Args:
        q: (B, H, T, D); k, v: (B, Hkv, S, D) with H a multiple of Hkv: query head h reads
            key/value head h // (H / Hkv).
        mask: (T, S), (B, T, S) or (B, H or 1, T, S), zero or False = hidden; replaces causality. A
            query that sees no key gives zeros.
        q_offset: absolute position of the first query, int or (B,) int64; S - T by default.

    Returns:
        (B, H, T, D).

    Raises:
        ValueError: the mask has another number of dimensions.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and not is_causal_mask(mask):
        if mask.ndim not in (2, 3, 4):
            raise ValueError(f"mask must have 2, 3 or 4 dimensions, got {tuple(mask.shape)}")
        visible = mask.bool() if mask.ndim != 3 else mask.bool()[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
    if q_offset is None:
        q_offset = keys - queries
    if isinstance(q_offset, int):
        if q_offset == 0 and queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if q_offset + 1 >= keys:  # the first query sees every key, and so do the others
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    # is_causal aligns the triangle at the top left, query 0 with key 0: with a cache, where the
    # queries are the last positions, it would hide almost everything. So an explicit mask.
    visible = causal_mask(queries, keys, q_offset, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
