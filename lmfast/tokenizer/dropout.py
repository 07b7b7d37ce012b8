"""BPE-dropout: encoding that leaves out merges at random, for training more robust models.

Source: Provilkov, Emelianenko and Voita 2020 (arXiv 1910.13267).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

_MASK = (1 << 64) - 1


class Random:
    """splitmix64: 64 bits of state, the same numbers in both engines."""

    def __init__(self, state: int) -> None:
        self.state = state

    def number(self) -> float:
        """In [0, 1), a multiple of 2^-53."""
        self.state = z = (self.state + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
        return ((z ^ z >> 31) >> 11) * 2.0**-53


def first_state(seed: int | None) -> int:
    """The state that a seed stands for; None: a new one."""
    if seed is None:
        return random.getrandbits(64)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an int or None, got {seed!r}")
    return int(seed) & _MASK


def merge_with_dropout(
    symbols: Sequence[int],
    ranks: Mapping[tuple[int, int], tuple[int, int]],
    dropout: float,
    draw: Random,
) -> list[int]:
    """Merge as usual, but in every step each possible merge is left out with this probability.

    A number is drawn for the possible merges in order, lowest rank and leftmost first, until one
    is not below ``dropout``: that one is done. Ends when all were left out or none is possible.
    """
    ids = list(symbols)
    while len(ids) > 1:
        found = sorted((ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks)
        kept = next((i for _, i in found if draw.number() >= dropout), None)
        if kept is None:
            break
        ids[kept : kept + 2] = [ranks[ids[kept], ids[kept + 1]][1]]
    return ids


def check_dropout(dropout: float) -> None:
    """Raises unless it is a probability."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float, np.integer, np.floating)):
        raise TypeError(f"dropout must be a float, got {dropout!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")


def piece_ends(pieces: Sequence[bytes]) -> Iterator[int]:
    """Where each of several pieces ends when they stand one behind the other."""
    end = 0
    for piece in pieces:
        end += len(piece)
        yield end
