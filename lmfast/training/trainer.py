"""The training loop."""

from __future__ import annotations

import math
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lmfast.training.checkpoint import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from lmfast.training.data import Batches
from lmfast.training.metrics import Evaluation, LossFunction, RunningLoss, evaluate, model_loss
from lmfast.training.seeding import random_state, set_random_state


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass
class TrainingReport:
    """What a run has done so far.

    Attributes:
        step: number of optimiser steps.
        tokens: number of targets learnt from.
        steps, losses: the loss of single steps, or means of a few on a GPU, and their last step.
        evaluations: (step, loss, perplexity) of each evaluation.
        rates: tokens per second of each of those entries, evaluation and checkpoints left out.
        interrupted: stopped by Ctrl-C before the last step.
    """

    step: int = 0
    tokens: int = 0
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Median rate; the first entries, which warm up, are left out where there are more."""
        steady = self.rates[3:] or self.rates
        return statistics.median(steady) if steady else math.nan


class Trainer:
    """Train a language model on batches, with progress, evaluation, checkpoints and resume.

    Args:
        model: with a `loss` method as `lmfast.models.LanguageModel`, or any module with `loss=`.
        batches: where training batches come from.
        max_steps: number of optimiser steps in all, earlier ones of a resumed run included.
        evaluation: batches to evaluate on.
        loss: mean loss of (model, inputs, targets, ignore_index), the model's own by default.
        optimizer: AdamW (betas 0.9 and 0.999, eps 1e-8, fused) by default.
        learning_rate, weight_decay: of the default optimiser.
        clip_norm: scale gradients down to this global norm; None = never.
        eval_every, save_every: steps between evaluations and checkpoints, 0 = never.
        output_dir: where checkpoints go; needed if `save_every` is set.
        keep: number of checkpoints kept, latest first.
        ignore_index: targets that do not count.
        progress: show a bar with loss and tokens per second on stderr.
        description: left of the bar.

    Ctrl-C ends the run after the step it is in; with an `output_dir` a checkpoint is written
    first. A second Ctrl-C interrupts at once.

    Raises:
        ValueError: a number out of range, or `save_every` without `output_dir`.
        TrainingDiverged: from `fit`, the loss became NaN or infinite; names the step. On a CPU the
            parameters are still those before that step.
        CheckpointError: from `resume`.

    Backends: those of the model; PyTorch's fused AdamW (measured 5 times its own loop).

    Source: Loshchilov and Hutter 2017 (AdamW), arXiv:1711.05101.

    Example:
        >>> from lmfast.models import RecurrentLanguageModel
        >>> from lmfast.training import PackedBatches
        >>> batches = PackedBatches(torch.arange(1, 40) % 5, 4, context=6)
        >>> trainer = Trainer(RecurrentLanguageModel(5, 8, 1, 0), batches, max_steps=3,
        ...                   progress=False)
        >>> trainer.fit().step
        3
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        max_steps: int,
        evaluation: Batches | None = None,
        loss: LossFunction = model_loss,
        optimizer: torch.optim.Optimizer | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        clip_norm: float | None = None,
        eval_every: int = 0,
        save_every: int = 0,
        output_dir: str | Path | None = None,
        keep: int = 2,
        ignore_index: int = -100,
        progress: bool = True,
        description: str = "train",
    ) -> None:
        for name, value in (("max_steps", max_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value in (("eval_every", eval_every), ("save_every", save_every)):
            if value < 0:
                raise ValueError(f"{name} must be 0 (never) or more, got {value}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0 or None, got {clip_norm}")
        if save_every and output_dir is None:
            raise ValueError("save_every needs an output_dir to save to")
        self.model = model
        self.batches = batches
        self.evaluation = evaluation
        self.max_steps = max_steps
        self.clip_norm = clip_norm
        self.eval_every = eval_every
        self.save_every = save_every
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.keep = keep
        self.ignore_index = ignore_index
        self.progress = progress
        self.description = description
        self.report = TrainingReport()
        self._loss = loss
        self._device = next(model.parameters()).device
        # On a GPU reading a loss waits for it, so there it is done every tenth step only.
        self._read_every = 1 if self._device.type == "cpu" else 10
        self.optimizer = optimizer or torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
        )
        self._interrupted = False

    def fit(self) -> TrainingReport:
        """Train up to `max_steps` and return the report.

        Raises:
            TrainingDiverged: the loss became NaN or infinite.
            ValueError: `output_dir` holds checkpoints of an earlier run that was not resumed.
        """
        if self.output_dir is not None and self.report.step == 0:
            existing = list_checkpoints(self.output_dir)
            if existing:
                raise ValueError(
                    f"{self.output_dir} holds checkpoints of an earlier run, up to "
                    f"{existing[-1].name}: resume it or choose another directory"
                )
        self._interrupted = False
        self.model.train()
        pending: list[tuple[int, Tensor, int]] = []
        with self._interruptible(), self._bar() as bar:
            started = time.perf_counter()
            while self.report.step < self.max_steps and not self._interrupted:
                pending.append(self._step())
                last = self.report.step == self.max_steps or self._interrupted
                if len(pending) < self._read_every and not last and not self._due():
                    continue
                self._read(pending, started)
                pending = []
                self._show(bar)
                if self._due(self.eval_every):
                    self.evaluate()
                if self._due(self.save_every):
                    self.save()
                started = time.perf_counter()
        self.report.interrupted = self._interrupted and self.report.step < self.max_steps
        if self.report.interrupted and self.output_dir is not None:
            self.save()
        return self.report

    def evaluate(self) -> Evaluation:
        """Evaluate now and put the result in the report.

        Raises:
            ValueError: the trainer has no evaluation batches.
        """
        if self.evaluation is None:
            raise ValueError("evaluation batches were not given to the trainer")
        result = evaluate(
            self.model, self.evaluation, loss=self._loss, ignore_index=self.ignore_index
        )
        self.report.evaluations.append((self.report.step, result.loss, result.perplexity))
        return result

    def save(self) -> Path:
        """Write a checkpoint of this step and return its directory.

        Raises:
            ValueError: the trainer has no `output_dir`.
            OSError: it cannot be written; earlier checkpoints are untouched.
        """
        if self.output_dir is None:
            raise ValueError("saving needs an output_dir")
        optimizer = self.optimizer.state_dict()
        random_tensors, random_values = random_state()
        tensors = {f"random.{name}": state for name, state in random_tensors.items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars.setdefault(str(index), {})[name] = value
        content = {
            "report": asdict(self.report),
            "data": self.batches.state_dict(),
            "random": random_values,
            "optimizer": {"groups": optimizer["param_groups"], "scalars": scalars},
        }
        path = checkpoint_path(self.output_dir, self.report.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, self.model, tensors, content)
        for old in list_checkpoints(self.output_dir)[: -self.keep]:
            shutil.rmtree(old)
        return path

    def resume(self, path: str | Path | None = None) -> None:
        """Continue from a checkpoint exactly: the same batches, random numbers and updates.

        Args:
            path: of a checkpoint directory; the latest in `output_dir` by default.

        Raises:
            CheckpointError: there is none, it is damaged or foreign, or of another model or data.
        """
        if path is None:
            if self.output_dir is None:
                raise ValueError("resume needs a path or an output_dir")
            path = latest_checkpoint(self.output_dir)
        parameters, config, tensors, content = load_checkpoint(path)
        own = getattr(self.model, "config", {"model": type(self.model).__name__})
        differing = sorted(k for k in {*own, *config} if own.get(k) != config.get(k))
        if differing:
            parts = [f"{k} is {own.get(k)!r}, not {config.get(k)!r}" for k in differing]
            raise CheckpointError(f"{path} is of another model: here {'; '.join(parts)}")
        try:
            self.batches.load_state_dict(content["data"])
            self.model.load_state_dict(parameters)
            self.optimizer.load_state_dict(_optimizer_state(tensors, content["optimizer"]))
            self.report = TrainingReport(**content["report"])
            random_tensors = _under("random.", tensors)
            set_random_state(random_tensors, content["random"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot resume from {path}: {error}") from error

    def _step(self) -> tuple[int, Tensor, int]:
        """Do one step and return its number, loss and number of tokens."""
        inputs, targets = self.batches.next_batch()
        tokens = int((targets != self.ignore_index).sum())
        step = self.report.step + 1
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(
            self.model, inputs.to(self._device), targets.to(self._device), self.ignore_index
        )
        if self._device.type == "cpu":
            _check_finite(step, loss)
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.report.step = step
        self.report.tokens += tokens
        return step, loss.detach(), tokens

    def _read(self, pending: list[tuple[int, Tensor, int]], started: float) -> None:
        running = RunningLoss()
        for step, loss, tokens in pending:
            _check_finite(step, loss)
            running.add(loss, tokens)
        self.report.steps.append(self.report.step)
        self.report.losses.append(running.mean())
        self.report.rates.append(running.tokens / (time.perf_counter() - started))

    def _due(self, *intervals: int) -> bool:
        intervals = intervals or (self.eval_every, self.save_every)
        return any(every and self.report.step % every == 0 for every in intervals)

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.max_steps,
            initial=self.report.step,
            desc=self.description,
            unit="step",
            disable=not self.progress,
            # Not a terminal: a line every five seconds instead of one that redraws itself.
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )

    def _show(self, bar: tqdm) -> None:
        recent = statistics.fmean(self.report.losses[-20:])
        text = f"loss {recent:.3f}, {self.report.rates[-1]:,.0f} tokens/s"
        if self.report.evaluations:
            text += f", held-out {self.report.evaluations[-1][1]:.3f}"
        bar.set_postfix_str(text, refresh=False)
        bar.update(self.report.step - bar.n)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the loop between two steps."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        previous = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

        def stop(number: int, frame: Any) -> None:
            self._interrupted = True
            signal.signal(signal.SIGINT, previous)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _check_finite(step: int, loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise TrainingDiverged(
            f"the loss at step {step} is {loss.item()}; a lower learning rate or clip_norm may help"
        )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}


def _optimizer_state(tensors: dict[str, Tensor], content: dict[str, Any]) -> dict[str, Any]:
    """Put an optimiser's state dict together again from its flat parts."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in _under("optimizer.", tensors).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    for key, scalars in content["scalars"].items():
        state.setdefault(int(key), {}).update(scalars)
    return {"state": state, "param_groups": content["groups"]}
