"""A step of a cache through all its layers at once, for an operator that runs a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmfast.cache._blocks import BlockTable
from lmfast.cache._step import NewTokens, Placement, new_tokens
from lmfast.cache._storage import Storage
from lmfast.cache.kv_cache import KVCache


@dataclass(slots=True)
class WholeStep:
    """Where the tokens of a step go, in all layers.

    Attributes:
        new: the tokens, on the host.
        placements: of each group of layers.
    """

    new: NewTokens
    placements: list[Placement]


def room(cache: KVCache) -> int | None:
    """Most tokens per row that a whole step may have: what layers with a window hold; None: any."""
    least: int | None = None
    for group in cache._groups:
        if isinstance(group, BlockTable):
            continue
        kept = min(cache.longest, group._kept)
        least = min(group._columns - kept, group._columns if least is None else least)
    return least


def begin(cache: KVCache, steps: int, counts: Sequence[int] | None) -> WholeStep:
    """Find room for the next `steps` tokens of every row, of which `counts` are real.

    Raises:
        ValueError: a step is half done, the cache is full, or counts that do not fit.
    """
    if cache._next_layer != 0:
        raise ValueError(
            f"layer {cache._next_layer} is the next to append; truncate or reset the cache to "
            "forget a step that was not finished"
        )
    new = new_tokens(cache._lengths, cache._longest, steps, counts, "right")
    if cache.max_length is not None and new.longest > cache.max_length:
        raise ValueError(
            f"the cache is full: {new.longest} tokens, max_length is {cache.max_length}; truncate "
            "it, or make it longer"
        )
    new.reach = new.ends  # padding is not looked at
    cache._forget_step()
    return WholeStep(new, [group.place(new) for group in cache._groups])


def finish(cache: KVCache, step: WholeStep) -> None:
    """The tokens of the step are stored, in all layers."""
    for group in cache._groups:
        group.finish()
    cache._lengths = step.new.ends
    cache._longest = step.new.longest


def storage_of(cache: KVCache, step: WholeStep) -> list[Storage]:
    """The storage of every layer."""
    return [step.placements[group].storage[layer] for layer, group in enumerate(cache._group_of)]


def row_spans(step: WholeStep, group: int) -> np.ndarray:
    """(B, 4) int64: first token of each row, how many, its column, columns in use afterwards."""
    new, first = step.new, step.placements[group].first
    counts = new.ends - new.starts
    spans = np.empty((len(counts), 4), dtype=np.int64)
    spans[:, 0] = np.cumsum(counts) - counts
    spans[:, 1] = counts
    spans[:, 2] = new.starts if first is None else new.starts - first
    spans[:, 3] = spans[:, 2] + counts
    return spans
