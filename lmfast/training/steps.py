"""One optimiser step: a batch in parts, over processes, as if it were one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.training.batches import Batches
from lmfast.training.clipping import clip_gradients
from lmfast.training.objective import Objective
from lmfast.training.processes import Processes, distribute, gradients_stay, let_go, whole
from lmfast.training.schedule import Schedule


class TrainingDiverged(RuntimeError):
    """The loss, or the norm of its gradient, is no longer a finite number."""


@dataclass
class Step:
    """What a step did.

    Attributes:
        number: counts from 1.
        where: name of its batch.
        tokens: targets of the batch, over all processes.
        loss: this process's share of the mean loss, on the device.
        norm: of the gradients before clipping, on the device.
        learning_rate: of the first parameter group.
        value: mean loss over all processes, NaN until `Stepper.settle` has looked.
    """

    number: int
    where: str
    tokens: int
    loss: Tensor
    norm: Tensor | None = None
    learning_rate: float = 0.0
    value: float = math.nan
    settled: bool = False


class Stepper:
    """Computes losses and updates parameters.

    The mean over a batch's tokens is the sum over its parts p, in whatever process, of

        loss_p tokens_p / tokens

    so each part's loss gets that weight before its backward pass, and the gradients of all parts
    add up to those of the batch. All processes read the same batches, so `tokens` is known to all.

    Args:
        objective: of the model.
        processes: that train together.
        ignore_index: targets that do not count.
        schedule, clip_norm, clip_value, accumulate: as in `Trainer`.
        shard: divide the parameters among the processes.
    """

    def __init__(
        self,
        objective: Objective,
        processes: Processes,
        *,
        ignore_index: int,
        schedule: Schedule,
        clip_norm: float | None,
        clip_value: float | None,
        accumulate: int,
        shard: bool,
    ) -> None:
        model = objective.model
        self._objective = objective
        self._processes = processes
        self._ignore_index = ignore_index
        self._schedule = schedule
        self._clip_norm = clip_norm
        self._clip_value = clip_value
        self._accumulate = accumulate
        self._device = next(model.parameters()).device
        self._module: Any = objective
        if processes.count > 1:
            self._module = distribute(objective, model, self._device, shard=shard)
        self._parameters = list(model.parameters())
        # What each part carries from batch to batch, if the batches are such.
        self.carried: list[Tensor | None] = [None] * accumulate
        # Reading a loss waits for a GPU, so there it is done now and then only.
        self.settles_at_once = self._device.type == "cpu"

    def step(self, number: int, batches: Batches, optimizer: torch.optim.Optimizer) -> Step:
        """Learn from the next batch.

        Raises:
            TrainingDiverged: on a CPU, the loss or, with `clip_norm`, the gradient is not finite;
                parameters are as before.
        """
        if batches.epoch_begins:
            self.carried = [None] * self._accumulate
        inputs, targets = batches.next_batch()
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for index, (x, y, weight) in enumerate(
            self._parts(inputs, targets, self._accumulate, batches.carries_state)
        ):
            last = index == self._accumulate - 1
            with nullcontext() if last else gradients_stay(self._module):
                loss, self.carried[index] = self._module(
                    x, y, self.carried[index], batches.carries_state
                )
                loss = _scaled(loss, weight)
                # DDP and FSDP2 divide the sum of gradients by the number of processes.
                _scaled(loss, self._processes.count).backward()
            losses.append(loss.detach())
        step = Step(number, batches.where(), self._tokens(targets), sum(losses[1:], losses[0]))
        if self.settles_at_once:
            self.settle([step])
        step.norm = clip_gradients(self._parameters, norm=self._clip_norm, value=self._clip_value)
        norm = self.norm(step) if self.settles_at_once else None
        if norm is not None and not math.isfinite(norm):
            raise TrainingDiverged(
                f"the norm of the gradient at step {number} is {norm}, for {step.where}; "
                "a lower learning rate or clip_value may help"
            )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule.factor(number)
        step.learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        return step

    def settle(self, steps: list[Step]) -> None:
        """Read the losses of steps; all processes must call it.

        Raises:
            TrainingDiverged: one is not finite.
        """
        unread = [step for step in steps if not step.settled]
        if not unread:
            return
        values = self._processes.sum(torch.stack([step.loss.double() for step in unread]))
        for step, value in zip(unread, values.tolist()):
            step.value, step.settled = value, True
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"the loss at step {step.number} is {value}, for {step.where}; "
                    "a lower learning rate or clip_norm may help"
                )

    def norm(self, step: Step) -> float | None:
        """Return the norm of a step's gradients, where it is known; all processes must call it."""
        return None if step.norm is None else whole(step.norm).item()

    def evaluation_loss(self, carries_state: bool) -> Any:
        """Return a loss function that gives this process's share of each batch's loss."""
        state: Tensor | None = None

        def share(model: nn.Module, inputs: Tensor, targets: Tensor, ignore: int) -> Tensor:
            nonlocal state
            ((x, y, weight),) = self._parts(inputs, targets, 1, carries_state)
            loss, state = self._objective(x, y, state, carries_state)
            return loss * weight

        return share

    def evaluated(self) -> None:
        """End an evaluation."""
        let_go(self._module)

    def _parts(
        self, inputs: Tensor, targets: Tensor, count: int, carries_state: bool
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Give this process's rows in so many parts, each with its weight in the batch's mean."""
        tokens = self._tokens(targets)
        rows = (self._processes.rows(batch, count) for batch in (inputs, targets))
        for x, y in zip(*rows):
            here = self._tokens(y)
            weight = 1.0 if here == tokens else here / tokens
            if carries_state and not len(x):
                raise ValueError(
                    f"a batch of {len(inputs)} rows cannot be divided into "
                    f"{self._processes.count} processes x {count} parts"
                )
            if not carries_state and not here and tokens:
                # Nothing to learn here, but the other processes wait for an exchange: any row
                # that has a target, with weight 0.
                row = int((targets != self._ignore_index).any(dim=1).nonzero()[0])
                x, y = inputs[row : row + 1], targets[row : row + 1]
            yield x.to(self._device), y.to(self._device), weight

    def _tokens(self, targets: Tensor) -> int:
        return int((targets != self._ignore_index).sum())


def _scaled(loss: Tensor, factor: float) -> Tensor:
    """Return loss * factor; a factor of 1 leaves the gradient 1, which fused losses know."""
    return loss if factor == 1 else loss * factor
