"""What one call of `Generator.generate` is to do."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor

from lmfast.ops.sample import check_settings

Ids = Sequence[int]
CONTEXT_POLICIES = ("error", "slide", "truncate")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The arguments of `Generator.generate`, by the names and with the defaults of transformers.

    Length and end:

    Args:
        max_new_tokens: upper limit of tokens added to each row.
        min_new_tokens: no row ends earlier; until then no end-of-text id is chosen.
        eos_token_id: id or ids that end a row; None = never; "auto" takes
            `model.generation_config.eos_token_id` where there is one, else never.
        pad_token_id: what follows in a row that has ended; by default that of the model's
            generation config, its `pad_idx`, an end-of-text id, or 0, the first there is.
        stop_sequences: a row ends when its new tokens end with one of these runs of ids.
        stop_strings: a row ends with the token that completes one of these in its new text.
        choices: each row continues with one of these texts or runs of ids, and ends with it.
        tokenizer: for `stop_strings` and for `choices` that are texts; a `BPETokenizer` or one of
            transformers.

    Choice of the next token:

    Args:
        do_sample: draw from the distribution of `lmfast.ops.sample` rather than take the
            likeliest token.
        temperature, top_k, top_p, min_p, typical_p: of that distribution; numbers, or (B,).
        repetition_penalty: against tokens of the prompt and generated ones; also on the greedy
            choice.
        penalize_prompt: False: `repetition_penalty` counts generated tokens alone.
        frequency_penalty, presence_penalty: against repeating generated tokens.
        logit_bias: added to the logits, id -> number, or (V,).
        suppress_tokens: ids never chosen, such as the unknown token's.
        generator: source of randomness when drawing; PyTorch's default one if None. On a CPU it is
            asked for up to 16 tokens at once, and may have given more than were used.

    Searches:

    Args:
        num_return_sequences: continuations of each prompt, next to each other in the result.
        best_of: draw so many per prompt and return the `num_return_sequences` that the model
            finds likeliest, by mean log-probability.
        num_beams: beam search with so many hypotheses.
        length_penalty: its scores are log-probabilities over length ** length_penalty.
        early_stopping: True: a row is done with its first `num_beams` ended hypotheses; False:
            when the best running one, at its present length, is behind all of them; "never": when
            no running one can still get ahead.
        prompt_lookup_num_tokens: try so many tokens at once that followed the same words before;
            the result is what it would be without, sooner.
        max_matching_ngram_size: longest run of tokens that is looked up.
        assistant_model: a smaller model of the same vocabulary that proposes tokens to try; greedy
            results are the same, drawn ones have the same distribution.
        num_assistant_tokens: how many at once.

    Memory and speed:

    Args:
        use_cache: False runs the whole text through the model for every token; the result is the
            same.
        prefill_chunk_size: feed prompts in parts of so many tokens.
        prefix: from `Generator.prefill`; its tokens are not computed again. All prompts must begin
            with them.
        context_window: tokens of context; the model's own limit by default.
        context_policy: when prompt and new tokens do not fit: "error"; "truncate": drop the
            beginning of the prompt so that they do; "slide": a row whose context is full goes on
            with the second half of it, computed anew.
        on_token: called after every step with the new ids (B,), for streaming.

    Raises:
        TypeError: an unknown name.
        ValueError: a number out of range, or arguments that exclude each other.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    eos_token_id: int | Ids | Literal["auto"] | None = "auto"
    pad_token_id: int | None = None
    stop_sequences: Sequence[Ids] = ()
    stop_strings: str | Sequence[str] = ()
    choices: Sequence[str | Ids] | None = None
    tokenizer: Any = None
    do_sample: bool = False
    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 50
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    typical_p: float | Tensor = 1.0
    repetition_penalty: float | Tensor = 1.0
    penalize_prompt: bool = True
    frequency_penalty: float | Tensor = 0.0
    presence_penalty: float | Tensor = 0.0
    logit_bias: Mapping[int, float] | Tensor | None = None
    suppress_tokens: Ids | None = None
    generator: torch.Generator | None = None
    num_return_sequences: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    assistant_model: Any = None
    num_assistant_tokens: int = 5
    use_cache: bool = True
    prefill_chunk_size: int | None = None
    prefix: Any = None
    context_window: int | None = None
    context_policy: Literal["error", "slide", "truncate"] = "error"
    on_token: Callable[[Tensor], None] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens"):
            self._integer(name, 0)
        for name in (
            "num_return_sequences", "num_beams", "max_matching_ngram_size", "num_assistant_tokens",
            "prompt_lookup_num_tokens", "prefill_chunk_size", "best_of",
        ):  # fmt: skip
            self._integer(name, 1)
        self._integer("context_window", 2)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens {self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        if self.context_policy not in CONTEXT_POLICIES:
            raise ValueError(
                f"context_policy must be one of {', '.join(CONTEXT_POLICIES)}, "
                f"got {self.context_policy!r}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}'
            )
        if self.do_sample not in (True, False):
            raise TypeError(f"do_sample must be True or False, got {self.do_sample!r}")
        if self.on_token is not None and not callable(self.on_token):
            raise TypeError(f"on_token must be a function, got {self.on_token!r}")
        if not isinstance(self.logit_bias, Mapping | Tensor | None):
            raise TypeError(
                f"logit_bias must be a mapping of ids or a tensor (V,), got {self.logit_bias!r}"
            )
        if not isinstance(self.length_penalty, Real):
            raise TypeError(f"length_penalty must be a number, got {self.length_penalty!r}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if isinstance(self.eos_token_id, str) and self.eos_token_id != "auto":
            raise ValueError(
                f'eos_token_id must be an id, ids, None or "auto", got {self.eos_token_id!r}'
            )
        self._check_ends()
        self._check_combinations()

    @classmethod
    def of_call(cls, max_new_tokens: int | None, options: dict[str, Any]) -> GenerationOptions:
        """Those of a call that takes `max_new_tokens` by place or by name."""
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"{name} is no option of generation{hint}")
        given = options if max_new_tokens is None else {**options, "max_new_tokens": max_new_tokens}
        if given.get("max_new_tokens") is None:
            raise TypeError("max_new_tokens must be given")
        return cls(**given)

    def _integer(self, name: str, lowest: int) -> None:
        object.__setattr__(self, name, checked_integer(name, getattr(self, name), lowest))

    def _check_ends(self) -> None:
        sequences = tuple(as_ids("each of stop_sequences", s) for s in self.stop_sequences)
        object.__setattr__(self, "stop_sequences", sequences)
        if not all(sequences):
            raise ValueError("a stop sequence must have at least one id")
        if self.suppress_tokens is not None:
            object.__setattr__(
                self, "suppress_tokens", as_ids("suppress_tokens", self.suppress_tokens)
            )
        if not isinstance(self.generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator, got {self.generator!r}")
        if any(not text for text in self.strings()):
            raise ValueError("a stop string must have at least one character")
        if self.choices is not None and len(self.choices) == 0:
            raise ValueError("choices must hold at least one text or run of ids, got none")
        if self.choices is not None and self.min_new_tokens > 0:
            raise ValueError(
                "min_new_tokens must be 0 with choices, which say where a row ends, "
                f"got {self.min_new_tokens}"
            )
        texts = any(isinstance(choice, str) for choice in self.choices or ())
        if self.tokenizer is None and (texts or self.strings()):
            what = "choices that are texts" if texts else "stop_strings"
            raise ValueError(f"tokenizer must be given with {what}")

    def _check_combinations(self) -> None:
        speculative = self.prompt_lookup_num_tokens is not None or self.assistant_model is not None
        if self.prompt_lookup_num_tokens is not None and self.assistant_model is not None:
            raise ValueError("prompt_lookup_num_tokens and assistant_model exclude each other")
        if self.num_beams > 1:
            for name, wrong in (
                ("do_sample=True", self.do_sample),
                ("best_of", self.best_of is not None),
                ("prompt_lookup_num_tokens or assistant_model", speculative),
                ("on_token, as hypotheses change", self.on_token is not None),
                ("use_cache=False", not self.use_cache),
                ('context_policy="slide"', self.context_policy == "slide"),
            ):
                if wrong:
                    raise ValueError(f"num_beams must be 1 with {name}, got {self.num_beams}")
            if self.num_return_sequences > self.num_beams:
                raise ValueError(
                    f"num_return_sequences must be at most num_beams {self.num_beams}, "
                    f"got {self.num_return_sequences}"
                )
        elif not self.do_sample and max(self.num_return_sequences, self.best_of or 1) > 1:
            raise ValueError(
                "num_return_sequences and best_of must be 1 without do_sample=True or num_beams: "
                "greedy continuations are all the same"
            )
        if self.best_of is not None and self.best_of < self.num_return_sequences:
            raise ValueError(
                f"best_of must be at least num_return_sequences {self.num_return_sequences}, "
                f"got {self.best_of}"
            )
        if speculative:
            for name, wrong in (
                ("use_cache=False", not self.use_cache),
                ('context_policy="slide"', self.context_policy == "slide"),
                ("choices", self.choices is not None),
            ):
                if wrong:
                    raise ValueError(f"speculative decoding does not go with {name}")

    def strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else [*self.stop_strings]

    def settings(self, batch: int) -> Tensor:
        """The numbers of `lmfast.ops.sample` for so many rows; the greedy choice is top-k of 1."""
        penalties = {
            name: getattr(self, name)
            for name in ("frequency_penalty", "presence_penalty", "repetition_penalty")
        }
        filters = {
            name: getattr(self, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")
        }
        settings = check_settings(batch, **filters, **penalties)
        return settings if self.do_sample else check_settings(batch, top_k=1, **penalties)

    def penalises(self) -> bool:
        """Whether tokens must be counted."""
        neutral = (
            (self.frequency_penalty, 0.0),
            (self.presence_penalty, 0.0),
            (self.repetition_penalty, 1.0),
        )
        return any(isinstance(value, Tensor) or value != off for value, off in neutral)

    def repeated(self, times: int) -> GenerationOptions:
        """The options of rows each of which occurs several times."""
        per_row: dict[str, Any] = {
            name: value.repeat_interleave(times)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "logit_bias"
        }
        return replace(self, **per_row) if per_row else self


def checked_integer(name: str, value: Any, lowest: int) -> int | None:
    """A whole number of any kind as an int, or None; TypeError or ValueError for what is not."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < lowest:
        wanted = "not be negative" if lowest == 0 else f"be at least {lowest}"
        raise ValueError(f"{name} must {wanted}, got {value}")
    return int(value)


class Ends:
    """Where a model says what ends its texts; does not keep the model in memory."""

    def __init__(self, model: Any) -> None:
        self._config = getattr(model, "generation_config", None)
        self._model: Callable[[], Any] = lambda: model
        with suppress(TypeError):  # a class without weak references
            self._model = weakref.ref(model)

    def config(self) -> Any:
        """The generation config that the model has now, or had when it was last seen; or None."""
        model = self._model()
        if model is not None:
            self._config = getattr(model, "generation_config", None)
        return self._config


def end_ids(config: Any, wanted: int | Ids | str | None) -> list[int]:
    """The ids that end a row."""
    if wanted == "auto":
        wanted = getattr(config, "eos_token_id", None)
    if wanted is None or isinstance(wanted, str):
        return []
    one = isinstance(wanted, Integral) or (isinstance(wanted, Tensor) and wanted.ndim == 0)
    return as_ids("eos_token_id", [wanted] if one else wanted)


def padding_id(config: Any, runner: Any, options: GenerationOptions, eos: list[int]) -> int:
    """What follows in a row that has ended, and is fed to the model there."""
    wanted = options.pad_token_id
    if wanted is not None:
        (wanted,) = as_ids("pad_token_id", [wanted])
        check_ids("pad_token_id", [wanted], runner.vocab_size)
        return wanted
    for candidate in (getattr(config, "pad_token_id", None), runner.pad_idx, *eos[:1]):
        if candidate is not None and 0 <= candidate < runner.vocab_size:  # -1 in some configs
            return candidate
    return 0


def as_ids(name: str, ids: Any) -> list[int]:
    """Ids of a sequence, array or tensor as a list; TypeError for anything else."""
    try:
        return [index(i) for i in ids]
    except TypeError:
        raise TypeError(f"{name} must be ids, got {ids!r}") from None


def check_ids(name: str, ids: Ids, vocab_size: int) -> None:
    """ValueError for ids outside the vocabulary."""
    if any(not 0 <= i < vocab_size for i in ids):
        raise ValueError(f"{name} must be in 0..{vocab_size - 1}, got {list(ids)}")
