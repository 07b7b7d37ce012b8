"""Loss and perplexity, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.tokenizer.training_arguments import whole

LossFunction = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def model_loss(model: nn.Module, ids: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Return the mean loss by the model's own `loss` method."""
    if not hasattr(model, "loss"):
        name = type(model).__name__
        raise TypeError(f"model must have loss(ids, targets), or loss= be given; {name} has none")
    return model.loss(ids, targets, ignore_index=ignore_index)  # type: ignore[operator]


class RunningLoss:
    """Mean loss per token over batches of different size, summed up where the losses are.

        mean = sum_i loss_i tokens_i / sum_i tokens_i

    Example:
        >>> running = RunningLoss()
        >>> running.add(torch.tensor(1.0), 1)
        >>> running.add(torch.tensor(4.0), 2)
        >>> running.mean()
        3.0
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, loss: Tensor, tokens: int) -> None:
        """Add a mean loss over `tokens` tokens; does not wait for the device."""
        weighted = loss.detach().double() * tokens
        self._sum = weighted if self._sum is None else self._sum + weighted
        self.tokens += tokens

    def mean(self) -> float:
        """Return the mean so far, NaN before the first token."""
        return math.nan if self._sum is None or not self.tokens else self._sum.item() / self.tokens


@dataclass(frozen=True)
class Evaluation:
    """Loss per token in nats, its exponential, and the number of tokens predicted."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: LossFunction = model_loss,
    ignore_index: int = -100,
    max_batches: int | None = None,
) -> Evaluation:
    """Measure the loss of a model on every target of some batches.

        loss = sum of -log p(target) / tokens,   perplexity = exp(loss)

    Args:
        model: switched to evaluation mode and back.
        batches: pairs of inputs and targets (B, T) int64.
        loss: mean loss of (model, inputs, targets, ignore_index); the model's own by default.
        ignore_index: targets that do not count.
        max_batches: stop after this many.

    Returns:
        The evaluation; without any token loss and perplexity are NaN.

    Raises:
        TypeError: an argument, or a batch, is of a wrong type; names it.
        ValueError: `max_batches` is below 1.

    Example:
        >>> from lmfast.models import RecurrentLanguageModel
        >>> model = RecurrentLanguageModel(50, 8, 1, 0)
        >>> _ = torch.nn.init.zeros_(model.fc.weight)  # now all 50 tokens are equally likely
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> round(evaluate(model, [(ids, ids)]).perplexity, 4)
        50.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of (inputs, targets), got {batches!r}")
    ignore_index = whole("ignore_index", ignore_index, -(2**63))
    most = None if max_batches is None else whole("max_batches", max_batches, 1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    running = RunningLoss()
    was_training = model.training
    model.eval()
    try:
        for count, batch in enumerate(batches):
            if count == most:
                break
            inputs, targets = _pair(batch, count)
            tokens = int((targets != ignore_index).sum())
            value = loss(model, inputs.to(device), targets.to(device), ignore_index)
            running.add(value, tokens)
    finally:
        model.train(was_training)
    mean = running.mean()
    return Evaluation(mean, exp_or_inf(mean), running.tokens)


def _pair(batch: Any, index: int) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and [isinstance(t, Tensor) for t in batch] == [True, True]:
        return batch[0], batch[1]
    kind = type(batch).__name__
    raise TypeError(f"batches must give pairs of tensors (inputs, targets); [{index}] is a {kind}")


def perplexity(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, ignore_index: int = -100
) -> float:
    """Return exp of the mean loss per token; see `evaluate`."""
    return evaluate(model, batches, ignore_index=ignore_index).perplexity


def exp_or_inf(value: float) -> float:
    """Return exp(value), infinity where it is beyond the largest float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
