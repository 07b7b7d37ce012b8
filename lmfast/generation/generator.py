"""Generating text: one object around a model, ready for many calls."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmfast.generation import static_step
from lmfast.generation.beam_job import search
from lmfast.generation.choices import ChoiceRows, ChoiceTree
from lmfast.generation.engine.quantised import QuantisedWeights
from lmfast.generation.kept import kept
from lmfast.generation.loop import Job, columns, decode, new_lengths
from lmfast.generation.module_runner import uncalled_hooks
from lmfast.generation.options import (
    Ends,
    GenerationOptions,
    check_ids,
    checked_integer,
    end_ids,
    padding_id,
)
from lmfast.generation.prefill import Prefix, check_is_prefix, feed, prefill, shared_tokens
from lmfast.generation.prompts import check_prompts, fit, with_new
from lmfast.generation.runner import Weights, make_runner
from lmfast.generation.running_batch import RunningBatch
from lmfast.generation.speculative import decode_speculatively
from lmfast.generation.transformers.options import options_from_transformers


class Completion(NamedTuple):
    """What `Generator.complete` returns, for B prompts and R continuations of each.

    Attributes:
        ids: (B * R, T + n) int64, the prompts as given and the new ids.
        lengths: (B * R,) int64, new ids of each row, the one it ended with included.
        log_probs: (B * R, n) fp32, the model's own log-probability of every new id, without
            penalties, temperature and filters; 0 behind a row's end. None from beam search.
        scores: (B * R,) fp32: log-probability over length ** length_penalty of beam search, else
            the mean of `log_probs`.
    """

    ids: Tensor
    lengths: Tensor
    log_probs: Tensor | None
    scores: Tensor


class Generator:
    """Continues texts with a model: greedily, by drawing, by beam search, ahead of the model.

    The weights are packed for the compiled engine when the object is made, so that changed weights
    or hooks need another; where it cannot take a model, its modules run, and `explain` says why.

    Args:
        model: an `lmfast.models.LanguageModel`, a causal language model of transformers, or
            anything with `vocab_size`, `step` and `new_state` as those of ours.
        weights: "fp32", or "bf16", "int8", "int4", in which the engine stores them: what limits
            the speed is reading them. Or what `lmfast.quantise` made or `QuantisedWeights.load`
            read; the model itself may go then.
        group: with "int8" and "int4", inputs that share a scale: 32, 64 or 128; None: all of int8,
            32 of int4.

    Raises:
        TypeError: the model is none of these.
        ValueError: weights that the engine cannot provide for this model.

    Backends: the compiled engine, or those of the model's modules; on a GPU, for decoders,
    recurrent models and those of transformers that run on static buffers, the modules in a CUDA
    graph per token, unless an option needs the host after every token.

    Example:
        >>> import torch
        >>> from lmfast.models import RecurrentLanguageModel
        >>> generator = Generator(RecurrentLanguageModel(50, 16, 1, 0))
        >>> generator.generate(torch.tensor([[3, 4]]), max_new_tokens=5).shape
        torch.Size([1, 7])
    """

    def __init__(
        self, model: Any, *, weights: Weights | QuantisedWeights = "fp32", group: int | None = None
    ) -> None:
        self.runner, self._reason = make_runner(model, weights, group)
        self._uncalled = uncalled_hooks(model)
        self._ends = Ends(model)
        self.weights = weights if isinstance(weights, str) else weights.kind

    def explain(self) -> str:
        """Print and return what runs the model, and if it is not the engine, why."""
        if self._reason is None:
            text = f"the compiled engine, with {self.weights} weights"
        else:
            text = f"the model's own modules: {self._reason}{static_step.explained(self.runner)}"
        text += self._uncalled
        print(f"Generator runs {text}")
        return text

    def memory(self) -> int:
        """Bytes of the weights, as the engine packed them or the model's modules have them."""
        return self.runner.memory()

    @torch.inference_mode()
    def prefill(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prefix: Prefix | None = None,
        capacity: int | None = None,
        prefill_chunk_size: int | None = None,
    ) -> Prefix:
        """Let the model see prompts, to continue from them more than once.

        Args:
            ids: (B, T) int64.
            attention_mask: (B, T), nonzero at real tokens.
            prefix: an earlier result for one row; what both begin with is not computed again.
            capacity: tokens per row to make room for, for `step`; None = growing.
            prefill_chunk_size: feed so many tokens at a time.

        Returns:
            A `Prefix`, for `generate(prefix=...)` if it has one row, or for `step`.
        """
        prompts = check_prompts(ids, attention_mask, self.runner.vocab_size)
        for name, value in (("capacity", capacity), ("prefill_chunk_size", prefill_chunk_size)):
            checked_integer(name, value, 1)
        if prefix is not None:
            shared = shared_tokens(prompts, prefix)
            if shared > 0 and hasattr(prefix.state, "truncate"):
                state = prefix.state.fork(1)
                state.truncate(shared)
                logits, state = feed(
                    self.runner, prompts.without(shared), state, prefill_chunk_size
                )
                return Prefix(ids, state, logits, prompts)
        logits, state = prefill(self.runner, prompts, capacity, prefill_chunk_size)
        return Prefix(ids, state, logits, prompts)

    @torch.inference_mode()
    def step(self, ids: Tensor, state: Any, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Feed the next tokens and return the logits of those that follow.

        Args:
            ids: (B, T) int64, or (B,) for one token per row.
            state: of `prefill` or the step before. It may be changed in place.
            lengths: (B,) int64, number of real tokens of each right-padded row; None = all.

        Returns:
            Logits (B, V) after each row's last token, and the state to pass next.
        """
        return self.runner.step(ids[:, None] if ids.ndim == 1 else ids, state, lengths)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue texts.

        Args:
            ids: (B, T) int64 prompts.
            max_new_tokens: upper limit of tokens added to each row; must be given.
            attention_mask: (B, T), nonzero at real tokens; padding may be left or right. Rows of
                different length each continue right after their own last token.
            **options: what `GenerationOptions` lists, by the names and with the defaults of
                transformers.

        Returns:
            (B * R, T + n) int64: the prompts as given and n <= max_new_tokens new ids, R =
            `num_return_sequences`; n is smaller only if every row has ended.

        Raises:
            TypeError: `ids` is no int64 tensor, or an option does not exist.
            ValueError: an empty prompt, an id outside the vocabulary, options that cannot be, or
                more tokens than the model's context has.
            RuntimeError: on a CPU, a model whose logits after the prompt hold NaN.
        """
        wanted = GenerationOptions.of_call(max_new_tokens, options)
        if wanted.best_of is not None:
            return self.complete(ids, max_new_tokens, attention_mask=attention_mask, **options).ids
        job = self._job(ids, attention_mask, wanted)
        if wanted.num_beams > 1 and job.prompts.lengths and wanted.max_new_tokens:
            new = search(job).ids
        else:
            new = columns(list(self._steps(job)), job)
        return with_new(ids, new, wanted.num_return_sequences)

    def complete(
        self,
        ids: Tensor,
        max_new_tokens: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Completion:
        """Continue texts as `generate` does, and also return lengths and log-probabilities."""
        wanted = GenerationOptions.of_call(max_new_tokens, options)
        job = self._job(ids, attention_mask, wanted, want_log_probs=True)
        copies = wanted.num_return_sequences
        if wanted.num_beams > 1 and job.prompts.lengths and wanted.max_new_tokens:
            new, scores, lengths = (t.clone() for t in search(job))
            return Completion(with_new(ids, new, copies), lengths, None, scores)
        new = columns(list(self._steps(job)), job)
        lengths = new_lengths(new, job)
        log_probs = new.new_zeros(new.shape, dtype=torch.float32)
        if job.log_probs:
            log_probs = torch.stack(job.log_probs[: new.shape[1]], dim=1)
        scores = log_probs.sum(1) / lengths.clamp_min(1)
        if wanted.best_of is not None and new.numel():
            best = scores.view(-1, wanted.best_of).topk(copies).indices
            first = torch.arange(len(best), device=best.device)[:, None] * wanted.best_of
            rows = (best + first).flatten()
            lengths, scores = lengths[rows], scores[rows]
            longest = int(lengths.max())
            new, log_probs = new[rows, :longest], log_probs[rows, :longest]
        return Completion(with_new(ids, new, copies), lengths, log_probs, scores)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Continue texts and give out the new ids (B,) step by step; arguments as of `generate`.

        Raises:
            ValueError: also for beam search and `best_of`, whose results are known at the end.
        """
        wanted = GenerationOptions.of_call(max_new_tokens, options)
        if wanted.num_beams > 1 or wanted.best_of is not None:
            raise ValueError("stream gives out tokens at once: leave out num_beams and best_of")
        job = self._job(ids, attention_mask, wanted)
        return (new.clone() for new in self._steps(job))

    def batch(self, prefix: Prefix | None = None) -> RunningBatch:
        """Return an empty `RunningBatch`, whose sequences come and go while the others run on.

        Args:
            prefix: of one row, from `prefill`; all sequences must begin with it.
        """
        if prefix is not None:
            check_is_prefix(prefix)
        return RunningBatch(self.runner, self._job_of_one, prefix)

    def _job_of_one(self, ids: Tensor, max_new_tokens: int | None, options: dict[str, Any]) -> Job:
        wanted = GenerationOptions.of_call(max_new_tokens, options)
        for name, set_ in (
            ("num_beams", wanted.num_beams > 1),
            ("num_return_sequences", wanted.num_return_sequences > 1),
            ("best_of", wanted.best_of is not None),
            ("prompt_lookup_num_tokens", wanted.prompt_lookup_num_tokens is not None),
            ("assistant_model", wanted.assistant_model is not None),
            ("use_cache=False", not wanted.use_cache),
            ('context_policy="slide"', wanted.context_policy == "slide"),
            ("prefix, which the batch has", wanted.prefix is not None),
            ("on_token", wanted.on_token is not None),
        ):
            if set_:
                raise ValueError(f"a sequence of a running batch cannot have {name}")
        return self._job(ids, None, wanted)

    def _steps(self, job: Job) -> Iterator[Tensor]:
        """The new ids of each step, told to `on_token`."""
        options = job.options
        if options.prompt_lookup_num_tokens is None and options.assistant_model is None:
            steps = decode(job)
        else:
            steps = decode_speculatively(job)
        tell = options.on_token
        for new in steps:
            if tell is not None:
                tell(new)
            yield new

    def _job(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        options: GenerationOptions,
        want_log_probs: bool = False,
    ) -> Job:
        runner = self.runner
        prompts = check_prompts(ids, attention_mask, runner.vocab_size)
        eos_ids = end_ids(self._ends.config(), options.eos_token_id)
        check_ids("eos_token_id", eos_ids, runner.vocab_size)
        for sequence in options.stop_sequences:
            check_ids("stop_sequences", sequence, runner.vocab_size)
        window = runner.max_positions
        if options.context_window is not None:
            if window is not None and options.context_window > window:
                raise ValueError(
                    f"context_window must be at most the model's {window}, "
                    f"got {options.context_window}"
                )
            window = options.context_window
        prompts = fit(prompts, options, window)
        copies = options.best_of or options.num_return_sequences
        copies = max(copies, options.num_beams)
        job = Job(
            runner=runner,
            options=options.repeated(copies) if copies > 1 else options,
            prompts=prompts.repeated(copies),
            copies=copies,
            eos_ids=eos_ids,
            pad_id=padding_id(self._ends.config(), runner, options, eos_ids),
            window=window,
            want_log_probs=want_log_probs,
        )
        if options.choices is not None:
            most = options.max_new_tokens
            tree = ChoiceTree(options.choices, options.tokenizer, runner.vocab_size, eos_ids, most)
            rows = len(job.prompts.lengths)
            job = replace(job, choices=ChoiceRows(tree, rows, runner.vocab_size, ids.device))
        return job


def generate(
    model: Any,
    ids: Tensor,
    max_new_tokens: int | None = None,
    *,
    weights: Weights | QuantisedWeights = "fp32",
    group: int | None = None,
    **options: Any,
) -> Tensor:
    """Continue texts in one call: `Generator(model).generate(...)`.

    What the engine packed stays for the next call, as long as the model lives, and is packed anew
    when the model has changed: by the version of its parameters, and, as changes through `.data`
    have none, by a sample of their numbers. A `Generator` also saves that comparison, 2 ms for a
    model of 12 layers.

    It is also what ``model.generate(ids, custom_generate=lmfast.generate)`` of transformers takes.
    What is then asked for in another way than by their configuration, such as processors of logits
    of one's own, raises; a streamer, which transformers does not pass on, sees the prompts only.

    Args:
        model: as of `Generator`.
        ids: (B, T) int64 prompts.
        max_new_tokens: upper limit of tokens added to each row.
        weights, group: as of `Generator`.
        **options: `attention_mask` and what `GenerationOptions` lists; from transformers its
            `generation_config` and what goes with it.

    Returns:
        (B * R, T + n) int64: the prompts as given and the new ids.

    Raises:
        TypeError, ValueError: as `Generator` and `Generator.generate`.

    Backends: those of `Generator`.

    Example:
        >>> import torch
        >>> from lmfast.models import RecurrentLanguageModel
        >>> model = RecurrentLanguageModel(50, 16, 1, 0)
        >>> generate(model, torch.tensor([[3, 4]]), 5).shape
        torch.Size([1, 7])
    """
    if "generation_config" in options:
        config = options.pop("generation_config")
        ids, options = options_from_transformers(
            ids, config, max_new_tokens=max_new_tokens, **options
        )
        max_new_tokens = options.pop("max_new_tokens")
    # What are no weights at all, make_runner names.
    known = weakref.ref(weights) if isinstance(weights, QuantisedWeights) else str(weights)
    key = (known, group)
    generator = kept(model, key, lambda: Generator(model, weights=weights, group=group))
    return generator.generate(ids, max_new_tokens, **options)
