"""The loop over tokens: choose, tell, feed, until every row has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmfast import ops
from lmfast.generation import static_step
from lmfast.generation.choices import ChoiceRows
from lmfast.generation.greedy_runs import GreedyRuns
from lmfast.generation.options import GenerationOptions
from lmfast.generation.prefill import checked, prefill
from lmfast.generation.prompts import Prompts, from_rows
from lmfast.generation.runner import Runner
from lmfast.generation.sampler import Sampler
from lmfast.generation.stopping import StopOfRow, StopOnDevice

# On a GPU, how many steps may run before the host asks whether all rows have ended.
_STEPS_UNASKED = 8


@dataclass
class Job:
    """One call: what to do, for which rows, and what ends them.

    Attributes:
        runner: of the model.
        options: of the call.
        prompts: rows, each as often as it is to be continued.
        copies: how often.
        eos_ids: that end a row.
        pad_id: follows in a row that has ended.
        window: tokens of context, or None.
        want_log_probs: keep the model's log-probability of every chosen token.
        choices: what rows may say, or None.
        log_probs: of every step, (B,) fp32, if wanted; 0 behind a row's end.
        lengths: new ids of each row, once it is known on the host.
    """

    runner: Runner
    options: GenerationOptions
    prompts: Prompts
    copies: int
    eos_ids: list[int]
    pad_id: int
    window: int | None
    want_log_probs: bool = False
    choices: ChoiceRows | None = None
    log_probs: list[Tensor] = field(default_factory=list)
    lengths: list[int] | None = None

    def start(self) -> tuple[Tensor, Any]:
        """Feed the prompts, each once."""
        options = self.options
        prompts = self.prompts
        if self.copies > 1:
            every = slice(None, None, self.copies)
            prompts = Prompts(prompts.ids[every], prompts.lengths[every])
        capacity = max(prompts.lengths) + options.max_new_tokens
        if self.window is not None:
            capacity = min(capacity, self.window)
        logits, state = prefill(
            self.runner, prompts, capacity, options.prefill_chunk_size, options.prefix
        )
        logits = checked(logits)
        if self.copies > 1:
            rows = torch.arange(len(prompts.lengths), device=logits.device)
            rows = rows.repeat_interleave(self.copies)
            need_rows(state, "several continuations of a prompt")
            logits = logits[rows]
            state.reorder(rows)
        return logits, state

    def row_stops(self) -> list[StopOfRow]:
        """What ends each row, on the host."""
        o = self.options
        return [
            StopOfRow(self.eos_ids, o.stop_sequences, o.strings(), o.tokenizer)
            for _ in self.prompts.lengths
        ]

    def note(self, logits: Tensor, ids: Tensor, ended: Tensor | None) -> None:
        """Keep the log-probabilities of chosen ids."""
        if self.want_log_probs:
            chosen = -ops.cross_entropy(logits.float(), ids, reduction="none")
            self.log_probs.append(chosen if ended is None else chosen.masked_fill(ended, 0.0))


def need_rows(state: Any, what: str) -> None:
    """ValueError for a state whose rows cannot be chosen."""
    if not hasattr(state, "reorder"):
        raise ValueError(f"{what} needs a state with reorder; {type(state).__name__} has none")


class Ends:
    """Which rows have ended, kept on the host, or on a GPU where nothing needs the host."""

    def __init__(self, job: Job) -> None:
        o = job.options
        batch, device = len(job.prompts.lengths), job.prompts.ids.device
        self._earliest = o.min_new_tokens
        self._pad = job.pad_id
        self._choices = job.choices
        self.any_rule = bool(job.eos_ids or o.stop_sequences or o.strings() or job.choices)
        self.on_device = device.type != "cpu" and not o.strings() and job.choices is None
        self.finished: Tensor | None = None  # before the newest ids
        self._flags = [False] * batch
        self._left = batch
        self._lengths = [o.max_new_tokens] * batch
        if not self.on_device:
            job.lengths = self._lengths
        self._rows = [] if self.on_device else job.row_stops()
        self._device_stop = (
            StopOnDevice(batch, job.eos_ids, o.stop_sequences, device) if self.on_device else None
        )

    def padded(self, ids: Tensor) -> Tensor:
        """The ids, with padding in rows that have ended."""
        return ids if self.finished is None else ids.masked_fill(self.finished, self._pad)

    def update(self, ids: Tensor, step: int) -> bool:
        """Take the next ids; True if no row is left. On a GPU that is asked now and then."""
        if not self.any_rule:
            return False
        may_end = step + 1 >= self._earliest
        if self._device_stop is not None:
            self.finished = self._device_stop.update(ids, may_end)
            return step % _STEPS_UNASKED == _STEPS_UNASKED - 1 and bool(self.finished.all())
        before = self._left
        for row, new_id in enumerate(ids.tolist()):
            if self._flags[row]:
                continue
            ended = self._rows[row].ends(new_id, may_end)
            if self._choices is not None:
                ended |= self._choices.advance(row, new_id)
            if ended:
                self._flags[row] = True
                self._lengths[row] = step + 1
                self._left -= 1
        if self._left != before:
            self.finished = torch.tensor(self._flags, device=ids.device)
        return self._left == 0


@torch.inference_mode()
def decode(job: Job) -> Iterator[Tensor]:
    """Yield the new ids (B,) of one step after the other."""
    options, runner = job.options, job.runner
    if not job.prompts.lengths or options.max_new_tokens == 0:
        return
    sampler = Sampler(options, job.prompts, runner.vocab_size, job.eos_ids)
    ends = Ends(job)
    context = Context(job) if options.context_policy == "slide" and job.window else None
    logits, state = job.start()
    if static_step.unsupported(job) is None:
        steps = static_step.decode_static(job, sampler, logits, state)
        if steps is not None:
            yield from steps
            return
    chosen: list[Tensor] = []
    last = options.max_new_tokens - 1
    runs = greedy_runs(job, sampler) if context is None else None
    known: list[Tensor] = []  # ids of the next steps that the state has, but the last of them
    for step in range(options.max_new_tokens):
        if known:
            new = ends.padded(known.pop(0))
        else:
            allowed = None if job.choices is None else job.choices.allowed()
            new = ends.padded(sampler(logits, step, allowed))
        sampler.count(new)
        job.note(logits, new, ends.finished)
        yield new
        if ends.update(new, step) or step == last:
            return
        if known:
            continue
        if runs is not None and step + 1 >= options.min_new_tokens:
            known = runs(new, state, last - step)
        elif not options.use_cache:
            chosen.append(new)
            text = joined(job.prompts, chosen)
            state = runner.new_state(len(text.lengths), max(text.lengths))
            logits, state = runner.step(text.ids, state, text.counts())
        elif context is None:
            logits, state = runner.step(new[:, None], state)
        else:
            logits, state = context.step(new, state)


def greedy_runs(job: Job, sampler: Sampler) -> GreedyRuns | None:
    """Runs of tokens, where the runner can choose them and nothing has to look at each."""
    alone = sampler.plain and job.choices is None and not job.want_log_probs
    if not alone or not job.options.use_cache or not hasattr(job.runner, "greedy"):
        return None
    return GreedyRuns(job.runner, job.eos_ids)


def joined(prompts: Prompts, chosen: list[Tensor]) -> Prompts:
    """The whole texts so far."""
    new = torch.stack(chosen, dim=1)
    if not prompts.ragged:
        ids = torch.cat((prompts.ids, new), dim=1)
        return Prompts(ids, [length + new.shape[1] for length in prompts.lengths])
    rows = zip(prompts.rows(), new.tolist(), strict=True)
    return from_rows([old + added for old, added in rows], new.device)


class Context:
    """A context that slides: a row that is full goes on with the second half of it, anew."""

    def __init__(self, job: Job) -> None:
        assert job.window is not None
        self._runner = job.runner
        self._window = job.window
        self._texts = job.prompts.rows()  # what the model sees of each row

    def step(self, new: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Feed the next ids (B,)."""
        for text, new_id in zip(self._texts, new.tolist(), strict=True):
            text.append(new_id)
        full = [row for row, text in enumerate(self._texts) if len(text) > self._window]
        if not full:
            return self._runner.step(new[:, None], state)
        need_rows(state, 'context_policy="slide"')
        for row in full:
            self._texts[row] = self._texts[row][-(self._window // 2) :]
        others = [row for row in range(len(new)) if row not in set(full)]
        anew = from_rows([self._texts[row] for row in full], new.device)
        fresh = state.sibling(len(full))
        logits, fresh = self._runner.step(anew.ids, fresh, anew.counts())
        state.reorder(others)
        if others:
            rest, state = self._runner.step(new[others][:, None], state)
            logits = torch.cat((rest, logits))
        state.append_rows(fresh)
        # Back into the order of the rows.
        order = torch.tensor([*others, *full], device=new.device).argsort()
        state.reorder(order)
        return logits[order], state


def columns(steps: list[Tensor], job: Job) -> Tensor:
    """New ids (B, n) of all steps, cut where the last row ended."""
    if not steps:
        return job.prompts.ids[:, :0]
    new = torch.stack(steps, dim=1)
    lengths = new_lengths(new, job)
    return new[:, : int(lengths.max())] if new.device.type != "cpu" else new


def new_lengths(new: Tensor, job: Job) -> Tensor:
    """(B,) new ids of each row up to the one it ended with."""
    if job.lengths is not None:
        lengths = [min(length, new.shape[1]) for length in job.lengths]
        return torch.tensor(lengths, dtype=torch.int64, device=new.device)
    stops = job.row_stops()
    lengths = []
    for ids, stop in zip(new.tolist(), stops, strict=True):
        length = len(ids)
        for step, new_id in enumerate(ids):
            if stop.ends(new_id, step + 1 >= job.options.min_new_tokens):
                length = step + 1
                break
        lengths.append(length)
    return torch.tensor(lengths, dtype=torch.int64, device=new.device)
