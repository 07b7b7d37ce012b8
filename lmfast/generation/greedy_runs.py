"""Greedy tokens by the run: one call of a runner that chooses them itself.

A step of a small model is 100 us of work, and as much again goes into choosing one token and coming
back from Python with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from torch import Tensor

# A run takes about so long: who reads a stream does not notice, and of what follows a stop string
# not much was for nothing.
_SECONDS = 8e-3
_MOST = 32


class GreedyRuns:
    """Runs of a length that takes 8 ms, at most 32 tokens.

    Args:
        runner: with `greedy(ids, state, steps, stops)`, as `EngineRunner` has it.
        stops: ids that end a run.
    """

    def __init__(self, runner: Any, stops: Sequence[int]) -> None:
        self._runner = runner
        self._stops = stops
        self._size = 4

    def __call__(self, new: Tensor, state: Any, left: int) -> list[Tensor]:
        """Feed ids (B,) and return the next ones, (B,) each: at least one, at most `left`."""
        size = 1 << (min(self._size, left).bit_length() - 1)
        begin = perf_counter()
        found = self._runner.greedy(new, state, size, self._stops)
        each = (perf_counter() - begin) / len(found)
        self._size = max(1, min(_MOST, int(_SECONDS / max(each, 1e-6))))
        return list(found.unbind())
