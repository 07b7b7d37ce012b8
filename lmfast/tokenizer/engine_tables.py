"""A model's data in the form that the engines take."""

from __future__ import annotations

from typing import Any

import numpy as np

from .model import Model
from .patterns import scanner_code


def dense_ranks(merges: np.ndarray) -> np.ndarray:
    """The merges with their ranks renumbered without gaps."""
    out = merges.copy()
    if len(out):
        out[:, 3] = np.cumsum(np.diff(out[:, 3], prepend=out[0, 3]) != 0)
    return out


def encoder_tables(model: Model) -> tuple[Any, ...]:
    """The arguments of an engine's Encoder that come from the model, in order."""
    symbols = model.symbols()
    if model.mode == "char":
        flat = [value for pair in symbols.items() for value in pair]
    else:
        flat = [symbols[byte] for byte in range(256)]
    return (
        scanner_code(model.pattern) or 0,
        model.mode == "char",
        model.whole_piece,
        model.ids[model.marker.encode()] if model.mode == "char" else -1,
        -1 if model.unk is None else model.special_tokens[model.unk],
        [token or b"" for token in model.tokens],
        np.array(flat, dtype=np.int32),
        np.ascontiguousarray(dense_ranks(model.merges), dtype=np.int32),
    )


def decoder_tables(model: Model) -> tuple[list[bytes], list[bool]]:
    """What each id decodes to, and which ids mean nothing."""
    texts = [token or b"" for token in model.tokens]
    unknown = [token is None for token in model.tokens]
    marker = model.marker.encode()
    if model.mode == "char":
        texts = [b" " + t[len(marker) :] if t.startswith(marker) else t for t in texts]
    for text, id in model.special_tokens.items():
        spaced = model.mode == "char" and text != model.unk
        texts[id] = (b" " if spaced else b"") + text.encode()
        unknown[id] = False
    return texts, unknown
