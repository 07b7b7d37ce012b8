"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.training import settings
from lmfast.training.batches import Batches
from lmfast.training.checkpoint import (
    add_checkpoint,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    recover_checkpoints,
    save_model,
    uncompiled,
)
from lmfast.training.files import CheckpointError
from lmfast.training.interrupt import StopRequest
from lmfast.training.logs import Log
from lmfast.training.metrics import Evaluation, LossFunction, evaluate, exp_or_inf, model_loss
from lmfast.training.objective import Objective, recomputed_blocks
from lmfast.training.processes import Processes
from lmfast.training.report import ProgressBar, TrainingReport
from lmfast.training.schedule import Schedule
from lmfast.training.state import (
    fill_copy,
    load_carried,
    load_optimizer,
    load_random,
    load_whole,
    optimizer_parts,
    random_parts,
    unsharded_copy,
    whole_carried,
)
from lmfast.training.steps import Step, Stepper


class Trainer:
    """Train a language model on batches, with progress, evaluation, checkpoints and resume.

    Args:
        model: with a `loss` method as `lmfast.models.LanguageModel`, or any module with `loss=`.
        batches: where training batches come from. With `ContiguousBatches` a recurrent model
            carries its state from batch to batch (truncated back-propagation through time).
        max_steps: number of optimiser steps in all, earlier ones of a resumed run included.
        evaluation: batches to evaluate on.
        loss: mean loss of (model, inputs, targets, ignore_index), the model's own by default.
        optimizer: AdamW (betas 0.9 and 0.999, eps 1e-8, fused) by default. One that takes sparse
            gradients saves the dense one of a table with `model.embedding.sparse = True`.
        learning_rate, weight_decay: of the default optimiser.
        schedule: multiplies the learning rates; constant by default.
        clip_norm: scale gradients down to this global norm; None = never.
        clip_value: before that, limit each number of them to this size; None = never.
        accumulate: each batch goes through the model in so many parts, one after the other; the
            step is that of the whole batch, in less memory.
        autocast: torch.bfloat16: compute in bf16 where PyTorch's autocast does; parameters,
            gradients and optimiser stay as they are.
        recompute: keep no activations inside the model's blocks, compute them again backwards.
        eval_every: steps between evaluations, 0 = never.
        save_every: steps between checkpoints; the end of a run is one, too. 0 = never.
        eval_batches: evaluate on the first so many batches, None = all.
        patience: stop after so many evaluations without a lower loss; None = never.
        output_dir: where checkpoints go; needed if `save_every` or `patience` is set.
        keep: number of checkpoints kept, latest first; with `patience` the best one besides.
        ignore_index: targets that do not count.
        shard: with several processes, divide parameters and optimiser among them (FSDP2) instead
            of giving each all of them (DDP).
        logs: take the figures of every step.
        progress: show a bar with loss, tokens per second and time left on stderr.
        description: left of the bar.

    Where PyTorch's default process group exists, its processes train one model together: each
    takes its rows of every batch, and the result is that of one process. The first one writes
    files. Ctrl-C or SIGTERM ends the run after the step it is in; with an `output_dir` a
    checkpoint is written first. A second one interrupts at once.

    Raises:
        ValueError: a number out of range, or settings that do not go together.
        TrainingDiverged: from `fit`, the loss became NaN or infinite; names the step and the batch.
            On a CPU the parameters are still those before that step.
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
        schedule: Schedule | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        recompute: bool = False,
        eval_every: int = 0,
        save_every: int = 0,
        eval_batches: int | None = None,
        patience: int | None = None,
        output_dir: str | Path | None = None,
        keep: int = 2,
        ignore_index: int = -100,
        shard: bool = False,
        logs: Sequence[Log] = (),
        progress: bool = True,
        description: str = "train",
    ) -> None:
        settings.check_numbers(
            {
                "max_steps": max_steps,
                "keep": keep,
                "accumulate": accumulate,
                "eval_batches": eval_batches,
                "patience": patience,
            },
            {"eval_every": eval_every, "save_every": save_every},
            {"clip_norm": clip_norm, "clip_value": clip_value},
        )
        settings.check_parts(loss, optimizer, schedule, logs)
        settings.check_saving(save_every, patience, output_dir, evaluation, eval_every)
        settings.check_model(model, recompute, autocast, loss is model_loss)
        for given in (batches,) if evaluation is None else (batches, evaluation):
            settings.check_batches(model, given, loss is model_loss)
        self._processes = Processes.current()
        settings.check_processes(self._processes, shard, optimizer)
        self.model = model
        self.batches = batches
        self.evaluation = evaluation
        self.max_steps = max_steps
        self.recompute = recompute
        self.eval_every = eval_every
        self.save_every = save_every
        self.eval_batches = eval_batches
        self.patience = patience
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.keep = keep
        self.ignore_index = ignore_index
        self.logs = logs
        self.progress, self.description = progress, description
        self.report, self._saved_step = TrainingReport(), 0
        self._empty_copy = unsharded_copy(model) if shard else None
        self._stepper = Stepper(
            Objective(model, loss, ignore_index, autocast),
            self._processes,
            ignore_index=ignore_index,
            schedule=schedule or Schedule(total_steps=max_steps),
            clip_norm=clip_norm,
            clip_value=clip_value,
            accumulate=accumulate,
            shard=shard,
        )
        self.optimizer = optimizer or torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
        )
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def fit(self) -> TrainingReport:
        """Train up to `max_steps` and return the report.

        Raises:
            TrainingDiverged: the loss became NaN or infinite.
            ValueError: `output_dir` holds checkpoints of an earlier run that was not resumed.
            DataError: a text cannot be used.
            OSError: a checkpoint cannot be written; names the last that could.
        """
        if self.output_dir is not None and self.report.step == 0:
            existing = list_checkpoints(self.output_dir)
            if existing:
                raise ValueError(
                    f"{self.output_dir} holds checkpoints of an earlier run, up to "
                    f"{existing[-1].name}: resume it or choose another directory"
                )
        self._processes.barrier()  # nobody saves before all have looked
        self.model.train()
        logs = self.logs if self._processes.first else ()
        for log in logs:
            log.open(self.report.step)
        shown = self.progress and self._processes.first
        bar = ProgressBar(self.report, self.max_steps, self.description, shown=shown)
        with StopRequest() as stop, bar, recomputed_blocks(self.model, enabled=self.recompute):
            try:
                stop_signal = self._loop(bar, logs, stop)
            finally:
                for log in logs:
                    log.close()
        self.report.stopped_early = self._out_of_patience()
        unfinished = self.report.step < self.max_steps and not self.report.stopped_early
        self.report.interrupted = unfinished and stop_signal > 0
        self.report.stop_signal = stop_signal if self.report.interrupted else 0
        if self.output_dir is not None and self._saved_step != self.report.step:
            if self.save_every or self.report.interrupted:
                self.save()
        return self.report

    def evaluate(self) -> Evaluation:
        """Evaluate now and put the result in the report.

        Raises:
            ValueError: the trainer has no evaluation batches.
        """
        if self.evaluation is None:
            raise ValueError("evaluation batches were not given to the trainer")
        share = evaluate(
            self.model,
            self.evaluation,
            loss=self._stepper.evaluation_loss(self.evaluation.carries_state),
            ignore_index=self.ignore_index,
            max_batches=self.eval_batches,
        )
        self._stepper.evaluated()
        device = next(self.model.parameters()).device
        loss = torch.tensor(share.loss, dtype=torch.float64, device=device)
        mean = self._processes.sum(loss).item()
        result = Evaluation(mean, exp_or_inf(mean), share.tokens)
        self.report.add_evaluation(result.loss, result.perplexity)
        return result

    def save(self) -> Path:
        """Write a checkpoint of this step and return its directory.

        Raises:
            ValueError: the trainer has no `output_dir`.
            OSError: it cannot be written; earlier checkpoints are untouched.
        """
        if self.output_dir is None:
            raise ValueError("saving needs an output_dir")
        model = self._whole_model()
        tensors, optimizer = optimizer_parts(self.optimizer)
        states, random = random_parts(self._processes)
        tensors |= states | whole_carried(self._stepper.carried, self._processes)
        content = {
            "report": asdict(self.report),
            "data": self.batches.state_dict(),
            "random": random,
            "optimizer": optimizer,
        }
        run, step = self.output_dir, self.report.step
        best = self.report.best[0] if self.report.best and self.patience is not None else None
        self._processes.in_first(
            lambda: add_checkpoint(run, step, model, tensors, content, keep=self.keep, spare=best)
        )
        self._saved_step = step
        return checkpoint_path(run, step)

    def save_model(self, directory: str | Path) -> None:
        """Write the model alone, in one piece, as `lmfast.training.save_model` does."""
        model = self._whole_model()
        self._processes.in_first(lambda: save_model(directory, model))

    def can_resume(self) -> bool:
        """Put in order what a killed run left behind; return whether there is a checkpoint."""
        run = self.output_dir
        if run is None:
            return False
        self._processes.in_first(lambda: recover_checkpoints(run))
        return bool(list_checkpoints(run))

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
            self.can_resume()
            path = latest_checkpoint(self.output_dir)
        tensors, content = self._load_model(path)
        device = next(self.model.parameters()).device
        parts = len(self._stepper.carried)
        try:
            self.batches.load_state_dict(content["data"])
            load_optimizer(self.optimizer, tensors, content["optimizer"])
            self._stepper.carried = load_carried(tensors, self._processes, parts, device)
            self.report = TrainingReport(**content["report"])
            load_random(self._processes, tensors, content["random"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot resume from {path}: {error}") from error

    def load_best(self) -> int:
        """Give the model the parameters of the best evaluated checkpoint, and return its step.

        Raises:
            ValueError: there was no evaluation, or no `output_dir`.
            CheckpointError: its checkpoint was not kept.
        """
        best = self.report.best
        if best is None or self.output_dir is None:
            raise ValueError("the best checkpoint needs evaluations and an output_dir")
        self._load_model(checkpoint_path(self.output_dir, best[0]))
        return best[0]

    def _loop(self, bar: ProgressBar, logs: Sequence[Log], stop: StopRequest) -> int:
        """Train, and return the signal that ended it, or 0."""
        read_every = 1 if self._stepper.settles_at_once else 10  # on a GPU, reading waits
        stopped = 0
        pending: list[Step] = []
        started = time.perf_counter()
        while self.report.step < self.max_steps and not stopped and not self._out_of_patience():
            step = self._stepper.step(self.report.step + 1, self.batches, self.optimizer)
            self.report.step = step.number
            self.report.tokens += step.tokens
            pending.append(step)
            last = self.report.step == self.max_steps
            if len(pending) < read_every and not last and not self._due():
                continue
            self._stepper.settle(pending)
            self._record(pending, time.perf_counter() - started)
            bar.update()
            figures = [self._figures(step) for step in pending]
            if self._due(self.eval_every):
                figures[-1]["held_out_loss"] = self.evaluate().loss
            for log in logs:
                for step, values in zip(pending, figures):
                    log.write(step.number, values)
            if self._due(self.save_every) or self._improved():
                self.save()
            stopped = self._processes.largest(stop.signal)
            pending = []
            started = time.perf_counter()
        return stopped

    def _record(self, steps: list[Step], seconds: float) -> None:
        self.report.steps += [step.number for step in steps]
        self.report.losses += [step.value for step in steps]
        self.report.rates.append(sum(step.tokens for step in steps) / seconds)

    def _figures(self, step: Step) -> dict[str, float]:
        values = {
            "tokens": self.report.tokens,
            "loss": step.value,
            "learning_rate": step.learning_rate,
            "tokens_per_second": self.report.rates[-1],
        }
        norm = self._stepper.norm(step)
        return values if norm is None else {**values, "gradient_norm": norm}

    def _due(self, *intervals: int) -> bool:
        intervals = intervals or (self.eval_every, self.save_every)
        return any(every and self.report.step % every == 0 for every in intervals)

    def _improved(self) -> bool:
        """Whether a checkpoint of this step must be kept because it is the best so far."""
        best = self.report.best
        return self.patience is not None and best is not None and best[0] == self.report.step

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.report.evaluations_since_best() >= self.patience

    def _whole_model(self) -> nn.Module:
        empty = self._empty_copy
        return self.model if empty is None else fill_copy(empty, self.model, self._processes)

    def _load_model(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load parameters and return the rest of a checkpoint."""
        parameters, config, tensors, content = load_checkpoint(path)
        own = getattr(self.model, "config", {"model": type(self.model).__name__})
        differing = sorted(k for k in {*own, *config} if own.get(k) != config.get(k))
        if differing:
            parts = [f"{k} is {own.get(k)!r}, not {config.get(k)!r}" for k in differing]
            raise CheckpointError(f"{path} is of another model: here {'; '.join(parts)}")
        try:
            load_whole(uncompiled(self.model), self._empty_copy, parameters)
        except RuntimeError as error:
            raise CheckpointError(f"cannot resume from {path}: {error}") from error
        return tensors, content
