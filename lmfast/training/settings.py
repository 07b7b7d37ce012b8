"""Settings of a `Trainer` that cannot be, told before anything is computed."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.tokenizer.training_arguments import whole
from lmfast.training.batches import Batches
from lmfast.training.processes import Processes
from lmfast.training.schedule import Schedule


def check_numbers(
    counts: dict[str, int | None], intervals: dict[str, int], bounds: dict[str, float | None]
) -> None:
    """Raise ValueError for a count below 1 (None will do), a negative interval, or a bound of 0;
    TypeError for what is no number."""
    for name, count in counts.items():
        if count is not None:
            whole(name, count, 1)
    for name, interval in intervals.items():
        if whole(name, interval, -sys.maxsize) < 0:
            raise ValueError(f"{name} must be 0 (never) or more, got {interval}")
    for name, bound in bounds.items():
        if bound is None:
            continue
        if not isinstance(bound, (int, float)):
            raise TypeError(f"{name} must be a number or None, got {bound!r}")
        if not bound > 0:
            raise ValueError(f"{name} must be above 0 or None, got {bound}")


def check_parts(loss: Any, optimizer: Any, schedule: Any, logs: Any) -> None:
    """Raise TypeError for what cannot take its part in a step."""
    if not callable(loss):
        raise TypeError(
            f"loss must be a function of (model, ids, targets, ignore_index), got {loss!r}"
        )
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be one of torch.optim or None, got {optimizer!r}")
    if not isinstance(schedule, Schedule | None):
        raise TypeError(f"schedule must be a Schedule or None, got {schedule!r}")
    if isinstance(logs, str) or not all(hasattr(log, "open") for log in logs):
        raise TypeError(f"logs must be a list of Log, got {logs!r}")


def check_saving(
    save_every: int, patience: int | None, output_dir: Any, evaluation: Any, eval_every: int
) -> None:
    """Raise ValueError where something is to be saved and cannot be."""
    if save_every and output_dir is None:
        raise ValueError("save_every needs an output_dir to save to")
    if patience is None:
        return
    if evaluation is None or not eval_every:
        raise ValueError("patience needs evaluation batches and eval_every")
    if output_dir is None:
        raise ValueError("patience needs an output_dir to keep the best checkpoint in")


def check_model(model: nn.Module, recompute: bool, autocast: Any, own_loss: bool) -> None:
    """Raise TypeError or ValueError for a way of training that the model does not have."""
    if own_loss and not hasattr(model, "loss"):
        raise TypeError(
            f"model must have loss(ids, targets), or Trainer be given loss=; "
            f"{type(model).__name__} has none"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, all are frozen")
    if recompute and not isinstance(getattr(model, "layers", None), nn.ModuleList):
        raise ValueError(
            f"recompute needs a model with its blocks in `layers`, as the decoder has; "
            f"{type(model).__name__} has none"
        )
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast}")


def check_batches(model: nn.Module, batches: Batches, own_loss: bool) -> None:
    """Raise TypeError for what are no batches, ValueError for a state the model does not have."""
    if not hasattr(batches, "next_batch"):
        raise TypeError(f"batches must be Batches of lmfast.training, got {type(batches).__name__}")
    if batches.carries_state:
        start = model.new_state(1) if hasattr(model, "advance") else None  # type: ignore[operator]
        if not own_loss or not isinstance(start, Tensor):
            raise ValueError(
                f"{type(batches).__name__} carry a state from batch to batch: that needs a "
                f"recurrent model of lmfast and its own loss, got {type(model).__name__}"
            )


def check_processes(processes: Processes, shard: bool, optimizer: Any) -> None:
    """Raise ValueError where parameters cannot be divided."""
    if shard and processes.count == 1:
        raise ValueError("shard needs several processes: start them with torchrun")
    if shard and optimizer is not None:
        raise ValueError(
            "shard needs the default optimizer: one made before holds undivided parameters"
        )
