"""Beam search for a `Job`: hypotheses over a runner's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmfast.generation.loop import Job, need_rows
from lmfast.generation.sampler import Sampler
from lmfast.generation.stopping import completes
from lmfast.models.beam import Beams, beam_search


class _Hypotheses:
    """The running hypotheses: the model's state, and what penalties, choices and ends look at."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sampler = Sampler(job.options, job.prompts, job.runner.vocab_size, job.eos_ids)
        self._logits, self._state = job.start()
        need_rows(self._state, "num_beams")
        self._length = -1
        self._texts: list[list[int]] = [[] for _ in job.prompts.lengths]

    def step(self, tokens: Tensor, _: Any) -> tuple[Tensor, Any]:
        """Log-probabilities of the next token, changed as the options say."""
        job = self._job
        self._length += 1
        if self._length > 0:
            self._sampler.count(tokens)
            for row, (text, token) in enumerate(zip(self._texts, tokens.tolist(), strict=True)):
                text.append(token)
                if job.choices is not None:
                    job.choices.advance(row, token)
            self._logits, self._state = job.runner.step(tokens[:, None], self._state)
        log_p = self._sampler.log_probs(self._logits.float().log_softmax(-1), self._length)
        if job.choices is not None:
            log_p = log_p + job.choices.allowed()
        return log_p, None

    def reorder(self, _: Any, index: Tensor) -> None:
        """Go on with the hypotheses of these numbers."""
        rows = index.tolist()
        self._texts = [list(self._texts[row]) for row in rows]
        self._sampler.select(index)
        self._state.reorder(index)
        if self._job.choices is not None:
            self._job.choices.select(rows)

    def ends(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Whether hypotheses end with these tokens."""
        job, options = self._job, self._job.options
        if self._length + 1 < options.min_new_tokens:
            return torch.zeros_like(tokens, dtype=torch.bool)

        def one(row: int, token: int) -> bool:
            if job.choices is not None and job.choices.would_end(row, token):
                return True
            return completes(
                [*self._texts[row], token],
                job.eos_ids,
                options.stop_sequences,
                options.strings(),
                options.tokenizer,
            )

        flags = [
            one(row, token)
            for row, token in zip(
                parents.flatten().tolist(), tokens.flatten().tolist(), strict=True
            )
        ]
        return torch.tensor(flags, device=tokens.device).view(tokens.shape)


@torch.inference_mode()
def search(job: Job) -> Beams:
    """Return the R best hypotheses of each prompt: ids (B * R, n), scores and lengths (B * R,)."""
    options = job.options
    hypotheses = _Hypotheses(job)
    plain = not (options.stop_sequences or options.strings() or job.choices)
    plain = plain and options.min_new_tokens <= 1
    found: Beams = beam_search(
        hypotheses.step,
        hypotheses.reorder,
        None,
        batch=len(job.prompts.lengths) // options.num_beams,
        num_beams=options.num_beams,
        max_length=options.max_new_tokens,
        bos_idx=0,
        eos_idx=job.eos_ids,
        pad_idx=job.pad_id,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        ends=None if plain else hypotheses.ends,
        only_best_end=True,
        device=job.prompts.ids.device,
    )
    keep = options.num_return_sequences
    ids, scores, lengths = (t[:, :keep].flatten(0, 1) for t in found)
    return Beams(ids[:, : int(lengths.max())], scores, lengths)
