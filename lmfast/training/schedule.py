"""Learning rates over a run, by the step alone: a resumed run has the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmfast.tokenizer.training_arguments import whole

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A warm-up that rises linearly from 0, then a constant, linear or cosine course to a floor.

        warm-up:  factor(s) = s / warmup_steps                              for s <= warmup_steps
        linear:   factor(s) = floor + (1 - floor) (1 - p)                   p = share of the rest
        cosine:   factor(s) = floor + (1 - floor) (1 + cos(pi p)) / 2

    Attributes:
        kind: "constant", "linear" or "cosine".
        total_steps: step at which the floor is reached; it holds from there on.
        warmup_steps: step at which the full rate is reached, 0 = from the first.
        floor: lowest factor, in [0, 1]; nothing to a constant schedule.

    Raises:
        ValueError: an unknown kind or a number out of range.

    Source: cosine: Loshchilov and Hutter 2016 (SGDR), arXiv:1608.03983.

    Example:
        >>> schedule = Schedule("cosine", total_steps=10, warmup_steps=2, floor=0.1)
        >>> [round(schedule.factor(step), 3) for step in (1, 2, 6, 10, 11)]
        [0.5, 1.0, 0.55, 0.1, 0.1]
    """

    kind: str = "constant"
    total_steps: int = 1
    warmup_steps: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        whole("total_steps", self.total_steps, 1)
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps must be in 0..total_steps ({self.total_steps}), "
                f"got {self.warmup_steps}"
            )
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")

    def factor(self, step: int) -> float:
        """Return what the full rate is multiplied with at a step; the first step is 1."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        rest = self.total_steps - self.warmup_steps
        passed = 1.0 if step >= self.total_steps else (step - self.warmup_steps) / rest
        course = 1 - passed if self.kind == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return self.floor + (1 - self.floor) * course
