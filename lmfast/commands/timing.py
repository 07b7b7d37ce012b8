"""Comparing the speed of two ways to compute the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def interleaved_medians(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    repeats: int,
    device: torch.device,
) -> tuple[float, float]:
    """Return the median seconds of two calls, taken in turns after two of each to warm up.

    In turns, because a machine's speed drifts by more than many differences that matter.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for call, times in zip((first, second), seconds):
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if turn >= 2:
                times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
