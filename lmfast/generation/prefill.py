"""Feeding prompts: what rows have in common once, and long ones in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.prompts import Prompts
from lmfast.generation.runner import Runner
from lmfast.ops._sample_reference import NO_DISTRIBUTION

# A common beginning of fewer tokens is not worth a step of its own.
_WORTH_SHARING = 32


@dataclass(frozen=True)
class Prefix:
    """Tokens a model has seen, to go on from; made by `Generator.prefill`.

    Attributes:
        ids: (B, T) int64, as given.
        state: after them.
        logits: (B, V), of the token that follows each row.
        prompts: the same tokens without padding in front.
    """

    ids: Tensor
    state: Any
    logits: Tensor
    prompts: Prompts


def prefill(
    runner: Runner,
    prompts: Prompts,
    capacity: int | None,
    chunk: int | None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Any]:
    """Return the logits (B, V) after each row's prompt, and the state.

    Args:
        runner: of the model.
        prompts: what the rows say, from the first token.
        capacity: tokens per row to make room for.
        chunk: tokens to feed at once; None = all.
        prefix: of one row, which all prompts begin with.
    """
    batch = len(prompts.lengths)
    if prefix is not None:
        return _continued(runner, prompts, chunk, prefix)
    common = prompts.common() if batch > 1 else 0
    # What is left of a prompt must be rounded as the whole of it would be.
    common = min(common, min(prompts.lengths, default=0) - getattr(runner, "rounded_from", 1))
    if chunk is not None:
        common -= common % chunk  # so that every row is cut where it would be alone
    state = runner.new_state(1 if common >= _WORTH_SHARING else batch, capacity)
    if common >= _WORTH_SHARING and not hasattr(state, "reorder"):
        state = runner.new_state(batch, capacity)
    elif common >= _WORTH_SHARING:
        beginning = Prompts(prompts.ids[:1, :common], [common])
        _, state = feed(runner, beginning, state, chunk)
        state.reorder([0] * batch)
        prompts = prompts.without(common)
    return feed(runner, prompts, state, chunk)


def checked(logits: Tensor) -> Tensor:
    """Return the logits after prompts.

    Raises:
        RuntimeError: on a CPU, a row has NaN, of which a greedy choice would say nothing. Looked at
            once, and not after every token: 2-5 us.
    """
    if logits.is_cpu and logits.numel() and math.isnan(logits.max().item()):
        row = int(logits.isnan().any(-1).nonzero()[0])
        raise RuntimeError(NO_DISTRIBUTION.format(row=row))
    return logits


def feed(runner: Runner, prompts: Prompts, state: Any, chunk: int | None) -> tuple[Tensor, Any]:
    """Feed tokens to rows that have a state, and return the logits after each row's last one."""
    width = prompts.ids.shape[1]
    if chunk is None or width <= chunk:
        return runner.step(prompts.ids, state, prompts.counts())
    ids, lengths = prompts.ids, torch.tensor(prompts.lengths, device=prompts.ids.device)
    logits: Tensor | None = None
    for begin in range(0, width, chunk):
        part = ids[:, begin : begin + chunk]
        real = (lengths - begin).clamp(0, part.shape[1]) if prompts.ragged else None
        new, state = runner.step(part, state, real)
        if logits is None or real is None:
            logits = new
        else:
            logits = torch.where((real > 0)[:, None], new, logits)
    assert logits is not None
    return logits, state


def _continued(
    runner: Runner, prompts: Prompts, chunk: int | None, prefix: Prefix
) -> tuple[Tensor, Any]:
    """Go on from a prefix, which stays as it is."""
    check_prefix(prompts, prefix)
    known = prefix.prompts.lengths[0]
    state = prefix.state.fork(len(prompts.lengths))
    rest = prompts.without(known)
    if max(rest.lengths) == 0:
        return prefix.logits.expand(len(prompts.lengths), -1), state
    logits, state = feed(runner, rest, state, chunk)
    if min(rest.lengths) == 0:
        nothing = torch.tensor(rest.lengths, device=logits.device) == 0
        logits = torch.where(nothing[:, None], prefix.logits, logits)
    return logits, state


def check_is_prefix(prefix: Any) -> None:
    """TypeError or ValueError unless it is a prefix of one row."""
    if not isinstance(prefix, Prefix):
        raise TypeError(f"prefix must be what Generator.prefill returned, got {prefix!r}")
    if len(prefix.prompts.lengths) != 1:
        raise ValueError(f"prefix must have one row, got {len(prefix.prompts.lengths)}")


def check_prefix(prompts: Prompts, prefix: Prefix) -> None:
    """TypeError or ValueError unless all prompts begin with the prefix."""
    check_is_prefix(prefix)
    known = prefix.prompts.rows()[0]
    for row, prompt in enumerate(prompts.rows()):
        if prompt[: len(known)] != known:
            raise ValueError(
                f"prompt {row} must begin with the {len(known)} tokens of prefix and does not"
            )


def shared_tokens(prompts: Prompts, prefix: Prefix) -> int:
    """How many tokens a prompt and a prefix have in common; one of the prompt's is left."""
    check_is_prefix(prefix)
    if len(prompts.lengths) != 1:
        raise ValueError(f"ids must have one row with a prefix, got {len(prompts.lengths)}")
    mine, known = prompts.rows()[0], prefix.prompts.rows()[0]
    count = 0
    for a, b in zip(mine[:-1], known, strict=False):
        if a != b:
            break
        count += 1
    return count
