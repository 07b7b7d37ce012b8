"""Continuous batching: sequences come and go while the others run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.loop import Job, need_rows
from lmfast.generation.prefill import Prefix, check_prefix, checked, feed
from lmfast.generation.runner import Runner
from lmfast.generation.sampler import Sampler
from lmfast.generation.stopping import StopOfRow


@dataclass
class _Sequence:
    job: Job
    sampler: Sampler
    stop: StopOfRow
    new: list[int]


class RunningBatch:
    """Sequences that are continued together, one token each per step.

    Every sequence gets the tokens it would get alone, also drawn ones when it has a generator of
    its own. Rows of the model's state are added and removed without copying the others.

    Args:
        runner: of the model.
        make_job: checks ids (1, T), `max_new_tokens` and options.
        prefix: what all sequences begin with, seen already.

    Example:
        >>> import torch
        >>> from lmfast import Generator
        >>> from lmfast.models import DecoderLanguageModel
        >>> batch = Generator(DecoderLanguageModel(50, 16, 2, 1, 0)).batch()
        >>> first = batch.add([3, 4], max_new_tokens=5)
        >>> len(batch.step())
        1
        >>> second = batch.add([7], max_new_tokens=2)
        >>> while batch.running:
        ...     new_ids = batch.step()
        >>> len(batch.new_ids(first)), len(batch.new_ids(second))
        (5, 2)
    """

    def __init__(
        self,
        runner: Runner,
        make_job: Callable[[Tensor, int | None, dict[str, Any]], Job],
        prefix: Prefix | None = None,
    ) -> None:
        self._runner = runner
        self._make_job = make_job
        self._prefix = prefix
        start = runner.new_state(1) if prefix is None else prefix.state
        need_rows(start, "a running batch")
        self._state = start.sibling(0)
        self._logits: Tensor | None = None  # (n, V) of those running
        self._sequences: dict[int, _Sequence] = {}
        self._next_key = 0
        self._running: list[int] = []
        self._chosen: dict[int, Tensor] = {}  # of a step that was not finished
        self._unseen: dict[int, int] = {}  # ids that the model has not been fed
        self._undecided: list[int] = []  # sequences that may end with their newest id
        self._ended: list[int] = []

    @property
    def running(self) -> list[int]:
        """Keys of the sequences that have not ended, in order of arrival."""
        return list(self._running)

    def new_ids(self, key: int) -> list[int]:
        """The ids a sequence has got so far.

        Raises:
            KeyError: there is no such sequence, or it was removed.
        """
        return list(self._sequences[key].new)

    @torch.inference_mode()
    def add(
        self, ids: Sequence[int] | Tensor, max_new_tokens: int | None = None, **options: Any
    ) -> int:
        """Take in a sequence and let the model see its prompt.

        Args:
            ids: (T,) its prompt.
            max_new_tokens: upper limit of its new tokens; must be given.
            **options: of `GenerationOptions` for one row; no searches, no sliding context.

        Returns:
            The key by which it is known, of no other sequence of this batch.

        Raises:
            TypeError, ValueError: as `Generator.generate`.
        """
        self._decide()
        self._feed()
        try:
            prompt = torch.as_tensor(ids, device=self._runner.device)
        except (TypeError, ValueError):
            raise TypeError(f"ids must be int64 ids (T,), got {ids!r}") from None
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(f"ids must be (T,) with T >= 1, got {tuple(prompt.shape)}")
        job = self._make_job(prompt[None], max_new_tokens, options)
        chunk = job.options.prefill_chunk_size
        if self._prefix is None:
            logits, state = feed(self._runner, job.prompts, self._state.sibling(1), chunk)
        else:
            check_prefix(job.prompts, self._prefix)
            rest = job.prompts.without(self._prefix.prompts.lengths[0])
            logits, state = self._prefix.logits, self._prefix.state.fork()
            if rest.lengths[0]:
                logits, state = feed(self._runner, rest, state, chunk)
        logits = checked(logits)
        key = self._next_key
        self._next_key += 1
        sampler = Sampler(job.options, job.prompts, self._runner.vocab_size, job.eos_ids)
        self._sequences[key] = _Sequence(job, sampler, job.row_stops()[0], [])
        if job.options.max_new_tokens:
            self._state.append_rows(state)
            self._running.append(key)
            known = [] if self._logits is None else [self._logits]
            self._logits = torch.cat((*known, logits))
        return key

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Choose one more id for every running sequence; those that end with it run no longer.

        After an error, for instance of a sequence that has no token left to draw, or Ctrl-C in the
        model, in drawing or in a tokenizer, `step` can be called again and goes on where it was;
        where it was an error, after `remove` of the sequence it names.

        Returns:
            The new ids by key.

        Raises:
            RuntimeError: a sequence for which nothing can be chosen, by its key.
        """
        self._decide()
        self._feed()
        if not self._running:
            return {}
        assert self._logits is not None
        for row, key in enumerate(self._running):
            if key not in self._chosen:
                self._chosen[key] = self._choose(key, self._logits[row : row + 1])
        chosen, self._chosen = self._chosen, {}
        new = {key: int(chosen[key]) for key in self._running}
        for key, new_id in new.items():
            self._sequences[key].sampler.count(chosen[key])
            self._sequences[key].new.append(new_id)
        self._unseen, self._undecided = dict(new), list(self._running)
        self._decide()
        self._feed()
        return new

    def _decide(self) -> None:
        """Let those end whose newest id ends them."""
        while self._undecided:
            key = self._undecided[0]
            if self._ends(self._sequences[key]):
                self._ended.append(key)
            del self._undecided[0]
        self._drop(self._ended)
        self._ended = []

    def remove(self, key: int) -> None:
        """Forget a sequence, running or not.

        Raises:
            KeyError: there is no such sequence.
        """
        if key not in self._sequences:
            raise KeyError(key)
        self._drop([key])
        del self._sequences[key]

    def _feed(self) -> None:
        """Let the model see the newest ids, if it has not."""
        if self._unseen:
            ids = torch.tensor([[self._unseen[key]] for key in self._running])
            try:
                logits, state = self._runner.step(ids.to(self._runner.device), self._state)
            except BaseException:
                if hasattr(self._state, "lengths"):  # some layers may have taken the ids
                    self._state.truncate(self._state.lengths)
                raise
            self._logits, self._state = logits, state
        self._unseen = {}

    def _choose(self, key: int, logits: Tensor) -> Tensor:
        sequence = self._sequences[key]
        choices = sequence.job.choices
        allowed = None if choices is None else choices.allowed()
        try:
            return sequence.sampler(logits, len(sequence.new), allowed)
        except RuntimeError as error:
            raise RuntimeError(f"sequence {key}: {error}") from error

    def _ends(self, sequence: _Sequence) -> bool:
        options, count = sequence.job.options, len(sequence.new)
        ended = sequence.stop.ends(sequence.new[-1], count >= options.min_new_tokens)
        if sequence.job.choices is not None:
            ended |= sequence.job.choices.advance(0, sequence.new[-1])
        return ended or count == options.max_new_tokens

    def _drop(self, keys: list[int]) -> None:
        rows = [row for row, key in enumerate(self._running) if key not in keys]
        if len(rows) == len(self._running):
            return
        assert self._logits is not None
        self._state.reorder(rows)
        self._logits = self._logits[rows]
        for key in set(keys).intersection(self._running):
            self._chosen.pop(key, None)
            self._unseen.pop(key, None)
        self._undecided = [key for key in self._undecided if key not in keys]
        self._running = [self._running[row] for row in rows]
