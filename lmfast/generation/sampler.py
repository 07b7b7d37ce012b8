"""Choosing the next ids of a batch by one call of `lmfast.ops.sample`'s kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lmfast._dispatch import select
from lmfast.generation.options import GenerationOptions, check_ids
from lmfast.generation.prompts import Prompts
from lmfast.generation.sampling import probabilities
from lmfast.ops._library import accumulation_dtype, with_unit_last_stride
from lmfast.ops._sample_reference import adjusted_scores
from lmfast.ops.sample import OP, uniform_numbers

_DRAWN_AT_ONCE = 16  # steps


class Sampler:
    """What turns logits into ids, row by row, and remembers what was generated.

    The implementation of `sample` is chosen at the first call.

    Args:
        options: of the call.
        prompts: of the rows.
        vocab_size: V.
        eos_ids: not chosen before `min_new_tokens`.

    Attributes:
        counts: (B, V) int32, how often each token was generated; None if nothing is penalised.
    """

    def __init__(
        self, options: GenerationOptions, prompts: Prompts, vocab_size: int, eos_ids: list[int]
    ) -> None:
        batch, device = prompts.ids.shape[0], prompts.ids.device
        never = list(options.suppress_tokens or ())
        check_ids("suppress_tokens", never, vocab_size)
        self.do_sample = options.do_sample
        self._generator = options.generator
        # The kernel reads its settings on the host, the reference where the logits are.
        self._settings = options.settings(batch).to(device)
        self._never = _ids(never, device)
        self._not_yet = _ids([*never, *eos_ids], device)
        self._min_new_tokens = options.min_new_tokens
        self._bias = _bias(options.logit_bias, vocab_size, device)
        self._uniform = torch.zeros(batch, dtype=torch.float64, device=device)
        self._last_step = options.max_new_tokens - 1
        self._at_once = _DRAWN_AT_ONCE
        self._drawn: list[Tensor] = []  # (B,) each, of the next steps, the first one last
        self._forward: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.counts: Tensor | None = None
        self._prompt_mask: Tensor | None = None
        if options.penalises():
            self.counts = torch.zeros(batch, vocab_size, dtype=torch.int32, device=device)
            self._ones = torch.ones(batch, 1, dtype=torch.int32, device=device)
            repetition = options.repetition_penalty
            if options.penalize_prompt and (isinstance(repetition, Tensor) or repetition != 1.0):
                self._prompt_mask = _seen(prompts, vocab_size)
        # Nothing changes the logits, but for ids that may not come yet.
        self.plain = (
            not options.do_sample and self.counts is None and self._bias is None and not never
        )

    def __call__(self, logits: Tensor, step: int, allowed: Tensor | None = None) -> Tensor:
        """Choose ids (B,) from logits (B, V).

        Args:
            logits: of the next token.
            step: how many tokens were generated before, for `min_new_tokens`.
            allowed: (B, V), 0 at ids that may come and -inf at the others; None = all.
        """
        if self.plain and allowed is None and step >= self._min_new_tokens:
            return logits.argmax(-1)
        args = (
            with_unit_last_stride(logits),
            self._numbers(logits, step) if self.do_sample else self._uniform,
            *self._adjustments(logits, step, allowed),
            False,
        )
        if self._forward is None:
            self._forward = select(OP, args).forward
        return self._forward(*args)[0]

    def draw_each_step(self) -> None:
        """Draw random numbers step by step from now on, as a step that is captured has to."""
        self._at_once = 1

    def _numbers(self, logits: Tensor, step: int) -> Tensor:
        """The random numbers (B,) of a step.

        On a CPU drawn for several steps at once: behind a token, whose weights have passed through
        the caches, the generator's code is not in them, and drawing took 60 us instead of 5. While
        all rows run they are those that step by step would give; a generator may be ahead of them.
        """
        if not logits.is_cpu:
            return uniform_numbers(logits, self._generator)
        if not self._drawn:
            count = max(1, min(self._at_once, self._last_step + 1 - step))
            shape = (count, logits.shape[0])
            numbers = torch.rand(shape, dtype=torch.float64, generator=self._generator)
            self._drawn = list(numbers.unbind())[::-1]
        return self._drawn.pop()

    def count(self, ids: Tensor) -> None:
        """Remember generated ids (B,)."""
        if self.counts is not None:
            self.counts.scatter_add_(1, ids[:, None], self._ones)

    def probabilities(self, logits: Tensor, step: int) -> Tensor:
        """The distribution (B, V) that ids are drawn from; all of it on one id when greedy."""
        return probabilities(logits, *self._adjustments(logits, step, None))

    def draw(self, shares: Tensor) -> Tensor:
        """Draw ids (B,) in proportion to shares (B, V)."""
        return torch.multinomial(shares, 1, generator=self._generator)[:, 0]

    def uniform(self) -> float:
        """A random number in [0, 1)."""
        device = "cpu" if self._generator is None else self._generator.device
        return float(torch.rand((), dtype=torch.float64, generator=self._generator, device=device))

    def log_probs(self, log_probs: Tensor, step: int) -> Tensor:
        """Log-probabilities (B, V) with bias, penalties and forbidden ids, not normalised."""
        return adjusted_scores(log_probs, *self._adjustments(log_probs, step, None))

    def select(self, rows: Tensor) -> None:
        """Keep the given rows in the given order."""
        if len(self._settings) > 1:
            self._settings = self._settings[rows.to(self._settings.device)]
        self._uniform = self._uniform[: len(rows)]
        self._drawn = [numbers[rows] for numbers in self._drawn]
        if self.counts is not None:
            self.counts, self._ones = self.counts[rows], self._ones[rows]
        if self._prompt_mask is not None:
            self._prompt_mask = self._prompt_mask[rows]

    def _adjustments(
        self, logits: Tensor, step: int, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        bias = self._bias
        if allowed is not None:
            bias = allowed if bias is None else allowed + bias
        if bias is not None:
            bias = bias.to(accumulation_dtype(logits.dtype))
        forbidden = self._never if step >= self._min_new_tokens else self._not_yet
        return self._settings, self.counts, self._prompt_mask, bias, forbidden


def _ids(ids: list[int], device: torch.device) -> Tensor | None:
    return torch.tensor(ids, dtype=torch.int64, device=device) if ids else None


def _bias(
    wanted: Mapping[int, float] | Tensor | None, vocab_size: int, device: torch.device
) -> Tensor | None:
    if wanted is None:
        return None
    if isinstance(wanted, Tensor):
        if wanted.shape != (vocab_size,):
            raise ValueError(f"logit_bias must be ({vocab_size},), got {tuple(wanted.shape)}")
        bias = wanted.to(device, torch.float32)
    else:
        check_ids("logit_bias", list(wanted), vocab_size)
        bias = torch.zeros(vocab_size)
        for index, value in wanted.items():
            bias[index] = value
        bias = bias.to(device)
    if bool((bias.isnan() | (bias == torch.inf)).any()):
        raise ValueError(
            "logit_bias must be finite, or -inf for ids never chosen; it has NaN or inf"
        )
    return bias


def _seen(prompts: Prompts, vocab_size: int) -> Tensor:
    """(B, V) bool, true at the tokens of each prompt."""
    ids = prompts.ids
    seen = torch.zeros(ids.shape[0], vocab_size + 1, dtype=torch.bool, device=ids.device)
    # Padding goes to a column of its own.
    ids = torch.where(prompts.mask(), ids, vocab_size) if prompts.ragged else ids
    return seen.scatter_(1, ids, True)[:, :vocab_size].contiguous()
