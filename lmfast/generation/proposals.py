"""Tokens that may come next, to be tried several at once: looked up, or drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lmfast.generation.options import GenerationOptions
from lmfast.generation.prefill import feed
from lmfast.generation.prompts import Prompts
from lmfast.generation.runner import Runner
from lmfast.generation.sampler import Sampler


class Proposal:
    """Candidates for one row.

    Attributes:
        ids: in order.
        distributions: what each was drawn from, (V,); None: they were not drawn.
    """

    def __init__(self, ids: list[int], distributions: list[Tensor] | None = None) -> None:
        self.ids = ids
        self.distributions = distributions


class Proposer(Protocol):
    """Where candidates come from."""

    def propose(self, limits: list[int]) -> list[Proposal]:
        """Return at most so many candidates for each row."""

    def accept(self, tokens: list[list[int]]) -> None:
        """Take the tokens each row really went on with."""

    def keep(self, rows: list[int]) -> None:
        """Keep the given rows."""


class LookUp:
    """What followed the last tokens of a text when they stood in it before.

    Args:
        texts: of each row.
        count: candidates at once.
        longest: run of tokens that is looked up; shorter ones when it did not occur.

    Source: Saxena 2023, prompt look-up decoding.

    Example:
        >>> look_up = LookUp([[1, 2, 3, 9, 1, 2]], 2, 2)
        >>> look_up.propose([5])[0].ids
        [3, 9]
    """

    def __init__(self, texts: Sequence[list[int]], count: int, longest: int) -> None:
        self._count = count
        self._longest = longest
        self._texts: list[list[int]] = [[] for _ in texts]
        # Where each run last ended, the run at the very end of the text left out.
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in texts]
        self.accept([list(text) for text in texts])

    def propose(self, limits: list[int]) -> list[Proposal]:
        """Return at most so many candidates for each row."""
        return [Proposal(self._row(row)[:limit]) for row, limit in enumerate(limits)]

    def _row(self, row: int) -> list[int]:
        text, ends = self._texts[row], self._ends[row]
        for size in range(min(self._longest, len(text)), 0, -1):
            end = ends.get(tuple(text[-size:]))
            if end is not None:
                return text[end : end + self._count]
        return []

    def accept(self, tokens: list[list[int]]) -> None:
        """Take the tokens each row really went on with."""
        for text, ends, new in zip(self._texts, self._ends, tokens, strict=True):
            for token in new:
                for size in range(1, min(self._longest, len(text)) + 1):
                    ends[tuple(text[-size:])] = len(text)
                text.append(token)

    def keep(self, rows: list[int]) -> None:
        """Keep the given rows."""
        self._texts = [self._texts[row] for row in rows]
        self._ends = [self._ends[row] for row in rows]


class Followed:
    """A model's state along rows of text, which can be taken back to where it was before.

    Args:
        runner, state: of the model.
    """

    def __init__(self, runner: Runner, state: Any, lengths: list[int]) -> None:
        self._runner = runner
        self._state = state
        self._lengths = list(lengths)  # tokens the state has seen
        self._since: list[list[int]] = [[] for _ in lengths]
        self._before: Any = None  # the state before them, where it cannot be shortened

    def feed(self, tokens: list[list[int]], device: torch.device) -> Tensor:
        """Feed tokens, at least one per row, and return the logits (B, T, V) after each."""
        if not hasattr(self._state, "truncate") and self._before is None:
            self._before = self._state.fork()
        for since, new in zip(self._since, tokens, strict=True):
            since += new
        ids, lengths = _padded(tokens, device)
        logits, self._state = self._runner.step(ids, self._state, lengths, all_positions=True)
        return logits

    def settle(self, counts: list[int]) -> None:
        """Keep of the tokens fed since the last time so many of each row."""
        forgets = any(len(s) > count for s, count in zip(self._since, counts, strict=True))
        self._lengths = [a + b for a, b in zip(self._lengths, counts, strict=True)]
        if forgets and self._before is None:
            self._state.truncate(self._lengths)
        elif forgets:
            self._state = self._before
            kept = [since[:count] for since, count in zip(self._since, counts, strict=True)]
            if any(kept):
                ids, lengths = _padded(kept, self._runner.device)
                _, self._state = self._runner.step(ids, self._state, lengths)
        self._since, self._before = [[] for _ in counts], None

    def keep(self, rows: list[int]) -> None:
        """Keep the given rows."""
        self._state.reorder(rows)
        self._lengths = [self._lengths[row] for row in rows]
        self._since = [[] for _ in rows]


def _padded(tokens: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    width = max(len(row) for row in tokens)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=device)
    lengths = [len(row) for row in tokens]
    return ids, None if min(lengths) == width else torch.tensor(lengths, device=device)


class Draft:
    """What a smaller model says.

    Args:
        runner: of that model.
        prompts: of the rows.
        options: of the call; the draft draws as it says, without penalties.

    Raises:
        ValueError: the vocabularies differ.
    """

    def __init__(
        self, runner: Runner, prompts: Prompts, options: GenerationOptions, vocab_size: int
    ) -> None:
        if runner.vocab_size != vocab_size:
            raise ValueError(
                f"assistant_model must have the model's vocabulary of {vocab_size} ids, "
                f"got {runner.vocab_size}"
            )
        self._count = options.num_assistant_tokens
        self._device = prompts.ids.device
        plain = replace(
            options,
            min_new_tokens=0,
            repetition_penalty=1.0,
            frequency_penalty=0.0,
            presence_penalty=0.0,
        )
        self._sampler = Sampler(plain, prompts, vocab_size, [])
        capacity = max(prompts.lengths) + options.max_new_tokens + self._count
        state = runner.new_state(len(prompts.lengths), capacity)
        _, state = feed(runner, prompts, state, options.prefill_chunk_size)
        self._model = Followed(runner, state, prompts.lengths)
        self._pending: list[list[int]] = [[] for _ in prompts.lengths]
        self._fed: list[int] = [0] * len(prompts.lengths)
        self._proposed: list[list[int]] = [[] for _ in prompts.lengths]

    def propose(self, limits: list[int]) -> list[Proposal]:
        """Return at most so many candidates for each row."""
        batch = len(limits)
        ids: list[list[int]] = [[] for _ in limits]
        distributions: list[list[Tensor]] = [[] for _ in limits]
        self._fed = [len(pending) for pending in self._pending]
        new = [list(pending) for pending in self._pending]
        for _ in range(min(self._count, max(limits))):
            logits = self._model.feed(new, self._device)
            ends = torch.tensor([len(row) - 1 for row in new], device=logits.device)
            last = logits[torch.arange(batch, device=logits.device), ends]  # (B, V)
            if self._sampler.do_sample:
                shares = self._sampler.probabilities(last, 0)
                chosen = self._sampler.draw(shares).tolist()
            else:
                shares, chosen = last, self._sampler(last, 0).tolist()
            for row, token in enumerate(chosen):
                ids[row].append(token)
                distributions[row].append(shares[row])
            new = [[token] for token in chosen]
        self._proposed = ids
        if not self._sampler.do_sample:
            return [Proposal(row[:limit]) for row, limit in zip(ids, limits, strict=True)]
        return [
            Proposal(row[:limit], drawn[:limit])
            for row, drawn, limit in zip(ids, distributions, limits, strict=True)
        ]

    def accept(self, tokens: list[list[int]]) -> None:
        """Take the tokens each row really went on with; the newest is fed with the next draft."""
        counts = []
        for row, new in enumerate(tokens):
            drafted = self._proposed[row]
            right = 0
            # The last candidate was not fed.
            while right < min(len(new), len(drafted) - 1) and new[right] == drafted[right]:
                right += 1
            counts.append(self._fed[row] + right)
            rest = [] if self._fed[row] else self._pending[row]
            self._pending[row] = rest + new[right:]
            self._proposed[row] = []
        self._model.settle(counts)
        self._fed = [0] * len(tokens)

    def keep(self, rows: list[int]) -> None:
        """Keep the given rows."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)
        self._sampler.select(index)
        self._model.keep(rows)
        self._pending = [self._pending[row] for row in rows]
        self._proposed = [self._proposed[row] for row in rows]
        self._fed = [self._fed[row] for row in rows]
