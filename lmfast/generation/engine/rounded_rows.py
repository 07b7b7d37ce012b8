"""When products with narrow weights may round their rows to bf16, as long prompts want it.

bf16 doubles the speed of arithmetic, AMX makes it 8 to 16 times as fast, and memory bounds a step
of few rows anyway. So that a row has the same numbers alone and in any batch, its own tokens in a
call decide, not how many there are in all; only a batch of very many rows decides for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Tokens of a row in one call, or rows of a batch.
ROUNDED_FROM = 32


def rounding(narrow: bool, batch: int, longest: int, everywhere: bool) -> int:
    """What the operators take: 0 no product may be rounded, 1 those of layers, 2 all.

    Args:
        narrow: whether weights are narrower than float32.
        batch: rows.
        longest: tokens of a row that has any, all short or all long.
        everywhere: whether logits of all tokens are wanted, for which the output layer has as many
            rows as the others.
    """
    if not narrow or max(batch, longest) < ROUNDED_FROM:
        return 0
    return 2 if everywhere or batch >= ROUNDED_FROM else 1


def short_rows(narrow: bool, counts: Sequence[int]) -> list[int] | None:
    """The tokens of rows that need a call of their own, 0 for others; None: one call for all."""
    if not narrow or len(counts) >= ROUNDED_FROM or max(counts, default=0) < ROUNDED_FROM:
        return None
    short = [n if n < ROUNDED_FROM else 0 for n in counts]
    return short if any(short) else None


def step_apart(
    runner: Any, ids: Tensor, state: Any, counts: Sequence[int], short: list[int], everywhere: bool
) -> Tensor:
    """The logits of `runner.step` for long and short rows, in two calls."""
    long = [n - m for n, m in zip(counts, short, strict=True)]
    logits, _ = runner.step(ids, state, torch.tensor(long), all_positions=everywhere)
    part, lengths = ids[:, : max(short)], torch.tensor(short)
    found, _ = runner.step(part, state, lengths, all_positions=everywhere)
    rows = lengths > 0
    if everywhere:
        logits[rows, : part.shape[1]] = found[rows]
    else:
        logits[rows] = found[rows]
    whole: Tensor = logits
    return whole
