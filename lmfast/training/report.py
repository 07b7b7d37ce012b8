"""What a run has done so far, and how it is shown while it goes."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass, field

from tqdm import tqdm


@dataclass
class TrainingReport:
    """What a run has done so far.

    Attributes:
        step: number of optimiser steps.
        tokens: number of targets learnt from.
        steps, losses: the loss of each step.
        evaluations: (step, loss, perplexity) of each evaluation.
        rates: tokens per second, evaluation and checkpoints left out.
        best: step and loss of the evaluation with the lowest loss.
        interrupted: stopped by Ctrl-C or SIGTERM before the last step.
        stop_signal: number of that signal, or 0.
        stopped_early: stopped because evaluations no longer got better.
    """

    step: int = 0
    tokens: int = 0
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    best: tuple[int, float] | None = None
    interrupted: bool = False
    stop_signal: int = 0
    stopped_early: bool = False

    def __post_init__(self) -> None:
        # JSON, from which a resumed run has them, knows lists only.
        self.evaluations = [(int(step), loss, value) for step, loss, value in self.evaluations]
        self.best = None if self.best is None else (self.best[0], self.best[1])

    @property
    def tokens_per_second(self) -> float:
        """Median rate; the first entries, which warm up, are left out where there are more."""
        steady = self.rates[3:] or self.rates
        return statistics.median(steady) if steady else math.nan

    def add_evaluation(self, loss: float, perplexity: float) -> None:
        """Note an evaluation of the current step."""
        self.evaluations.append((self.step, loss, perplexity))
        if not math.isnan(loss) and (self.best is None or loss < self.best[1]):
            self.best = (self.step, loss)

    def evaluations_since_best(self) -> int:
        """Number of evaluations at later steps than the best one."""
        best = 0 if self.best is None else self.best[0]
        return sum(step > best for step, *_ in self.evaluations)


class ProgressBar:
    """Steps done and to do, loss, tokens per second and the time left, on stderr."""

    def __init__(self, report: TrainingReport, max_steps: int, title: str, *, shown: bool) -> None:
        self._report = report
        self._bar = tqdm(
            total=max_steps,
            initial=report.step,
            desc=title,
            unit="step",
            disable=not shown,
            # Not a terminal: a line every five seconds instead of one that redraws itself.
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def update(self) -> None:
        """Show what the report says now."""
        if self._bar.disable:
            return
        report = self._report
        recent = statistics.fmean(report.losses[-20:])
        text = f"loss {recent:.3f}, {report.rates[-1]:,.0f} tokens/s"
        if report.evaluations:
            text += f", held-out {report.evaluations[-1][1]:.3f}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(report.step - self._bar.n)
