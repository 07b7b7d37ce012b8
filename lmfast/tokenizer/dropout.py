"""BPE-dropout: encoding that leaves out merges at random, for training more robust models.

Source: Provilkov, Emelianenko and Voita 2020 (arXiv 1910.13267).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .model import Model
from .patterns import splitter
from .reference import Specials, sound_text, to_bytes


def merge_with_dropout(
    symbols: Sequence[int],
    ranks: Mapping[tuple[int, int], tuple[int, int]],
    dropout: float,
    draw: random.Random,
) -> list[int]:
    """Merge as usual, but in every step each possible merge is left out with this probability.

    Merging ends when no merge is possible or all possible ones were left out.
    """
    ids = list(symbols)
    while len(ids) > 1:
        found = sorted((ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks)
        kept = next((i for _, i in found if draw.random() >= dropout), None)
        if kept is None:
            break
        ids[kept : kept + 2] = [ranks[ids[kept], ids[kept + 1]][1]]
    return ids


def encode_with_dropout(
    model: Model,
    text: str | bytes,
    specials: Sequence[tuple[bytes, int]],
    dropout: float,
    seed: int | None,
) -> list[int]:
    """The ids of a text with dropout; the same on every backend for the same seed."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    draw = random.Random(seed)
    ranks, symbols, split = model.rank_table, model.symbols(), splitter(model.pattern)
    ids: list[int] = []
    for part, special in Specials(specials).split(sound_text(text)):
        if special is not None:
            ids.append(special)
            continue
        for piece in split(part):
            if model.mode == "char":
                unk = model.special_tokens[model.unk or ""]
                start = [model.ids[model.marker.encode()]]
                start += [symbols.get(ord(c), unk) for c in piece]
            else:
                start = [symbols[b] for b in to_bytes(piece)]
            ids += merge_with_dropout(start, ranks, dropout, draw)
    return ids
