"""Speculative decoding: the model looks at several candidates in one step.

Every candidate is accepted or replaced such that the tokens are those, or have the distribution
of those, that the model alone would have given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.loop import Job, need_rows
from lmfast.generation.options import GenerationOptions
from lmfast.generation.prompts import Prompts
from lmfast.generation.proposals import Draft, Followed, LookUp, Proposal, Proposer
from lmfast.generation.runner import make_runner
from lmfast.generation.sampler import Sampler
from lmfast.generation.stopping import StopOfRow


@dataclass
class _Row:
    """One row: what chooses its tokens, what ends it, and those not given out yet."""

    sampler: Sampler
    stop: StopOfRow
    queue: list[tuple[int, float]]
    count: int = 0
    finished: bool = False


@torch.inference_mode()
def decode_speculatively(job: Job) -> Iterator[Tensor]:
    """Yield the new ids (B,) of one step after the other, as `decode` does.

    Source: Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
    """
    if not job.prompts.lengths or job.options.max_new_tokens == 0:
        return
    logits, state = job.start()
    need_rows(state, "speculative decoding")
    rows = [_row(job, index) for index in range(len(job.prompts.lengths))]
    proposer = _proposer(job)
    model = Followed(job.runner, state, job.prompts.lengths)
    running = list(range(len(rows)))
    # With the token before them fewer than a runner would round.
    rounded_from = getattr(job.runner, "rounded_from", 1)
    most = rounded_from - 2 if rounded_from > 1 else job.options.max_new_tokens
    tokens = [_extend(job, rows[i], logits[i : i + 1], Proposal([])) for i in running]
    while True:
        proposer.accept(tokens)
        still = [place for place, index in enumerate(running) if not rows[index].finished]
        if len(still) < len(running):
            running = [running[place] for place in still]
            tokens = [tokens[place] for place in still]
            if still:
                proposer.keep(still)
                model.keep(still)
        yield from _columns(job, rows)
        if not running:
            job.lengths = [row.count for row in rows]
            return
        limits = [min(most, job.options.max_new_tokens - rows[i].count - 1) for i in running]
        proposals = proposer.propose(limits) if max(limits) else [Proposal([]) for _ in limits]
        fed = [[new[-1], *p.ids] for new, p in zip(tokens, proposals, strict=True)]
        logits = model.feed(fed, job.runner.device)
        tokens = [
            _extend(job, rows[index], logits[place], proposals[place])
            for place, index in enumerate(running)
        ]
        # The newest token has not been fed.
        model.settle([len(new) for new in tokens])


def _row(job: Job, index: int) -> _Row:
    """The row's own sampler: rows advance by different numbers of tokens."""
    prompt = Prompts(job.prompts.ids[index : index + 1], [job.prompts.lengths[index]])
    options = row_options(job.options, index)
    sampler = Sampler(options, prompt, job.runner.vocab_size, job.eos_ids)
    return _Row(sampler, job.row_stops()[index], [])


def row_options(options: GenerationOptions, index: int) -> GenerationOptions:
    """The options of one row, where they differ by row."""
    own: dict[str, Any] = {
        name: value[index : index + 1]
        for name, value in vars(options).items()
        if isinstance(value, Tensor) and name != "logit_bias"
    }
    return replace(options, **own) if own else options


def _proposer(job: Job) -> Proposer:
    options = job.options
    if options.assistant_model is None:
        assert options.prompt_lookup_num_tokens is not None
        texts = job.prompts.rows()
        return LookUp(texts, options.prompt_lookup_num_tokens, options.max_matching_ngram_size)
    assistant = getattr(options.assistant_model, "runner", None)  # a Generator
    if assistant is None:
        assistant, _ = make_runner(options.assistant_model)
    return Draft(assistant, job.prompts, options, job.runner.vocab_size)


def _extend(job: Job, row: _Row, logits: Tensor, proposal: Proposal) -> list[int]:
    """Accept candidates as long as the model agrees, and add one token of its own.

    Args:
        logits: (n + 1 or more, V), after the row's last token and after each candidate.
    """
    new: list[int] = []
    for place in range(len(proposal.ids) + 1):
        candidate = proposal.ids[place] if place < len(proposal.ids) else None
        here = logits[place : place + 1]
        drawn = None if proposal.distributions is None else proposal.distributions
        token = _choose(
            row, here, candidate, drawn[place] if drawn and candidate is not None else None
        )
        log_p = float(here[0].float().log_softmax(-1)[token]) if job.want_log_probs else 0.0
        row.count += 1
        row.queue.append((token, log_p))
        new.append(token)
        if row.sampler.counts is not None:
            row.sampler.count(torch.tensor([token], device=logits.device))
        ended = row.stop.ends(token, row.count >= job.options.min_new_tokens)
        if ended or row.count == job.options.max_new_tokens:
            row.finished = True
            break
        if token != candidate:
            break
    return new


def _choose(row: _Row, logits: Tensor, candidate: int | None, drawn: Tensor | None) -> int:
    """The next token: the candidate, or what takes its place."""
    sampler = row.sampler
    if not sampler.do_sample or candidate is None:
        return int(sampler(logits, row.count))
    shares = sampler.probabilities(logits, row.count)[0]  # (V,)
    proposed = 1.0 if drawn is None else float(drawn[candidate])
    if sampler.uniform() * proposed < float(shares[candidate]):
        return candidate
    # What remains of the distribution when the candidate's share has been given out.
    if drawn is None:
        rest = shares.clone()
        rest[candidate] = 0.0
    else:
        rest = (shares - drawn).clamp_min(0.0)
    return int(sampler.draw(rest[None]))


def _columns(job: Job, rows: list[_Row]) -> Iterator[Tensor]:
    """What all rows have, as ids (B,) step by step; padding in those that have ended."""
    waiting = [len(row.queue) for row in rows if not row.finished]
    ready = min(waiting) if waiting else max(len(row.queue) for row in rows)
    device = job.prompts.ids.device
    for _ in range(ready):
        step = [row.queue.pop(0) if row.queue else (job.pad_id, 0.0) for row in rows]
        if job.want_log_probs:
            job.log_probs.append(torch.tensor([log_p for _, log_p in step], device=device))
        yield torch.tensor([token for token, _ in step], device=device)
