"""Generating text from a model, one token per row and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lmfast.generation.sampling import check_sampling, penalise, sample
from lmfast.generation.stopping import StopCondition


class StatefulModel(Protocol):
    """What `generate` needs of a model; `lmfast.models.LanguageModel` has it."""

    vocab_size: int
    pad_idx: int | None

    def new_state(self, batch: int, capacity: int | None = None) -> Any:
        """Return the state before the first token."""

    def step(self, ids: Tensor, state: Any, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return logits (B, V) after the next tokens, and the state after them."""


@dataclass(frozen=True)
class _Choice:
    """How the next ids follow from logits."""

    do_sample: bool
    temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor
    min_p: float | Tensor
    frequency_penalty: float | Tensor
    presence_penalty: float | Tensor
    repetition_penalty: float | Tensor
    generator: torch.Generator | None

    def __call__(self, logits: Tensor, counts: Tensor | None) -> Tensor:
        penalties = {
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        if not self.do_sample:
            scores = logits if counts is None else penalise(logits, counts, **penalties)
            return scores.argmax(dim=-1)
        return sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            counts=counts,
            generator=self.generator,
            **penalties,
        )

    def needs_counts(self) -> bool:
        neutral = (
            (self.frequency_penalty, 0.0),
            (self.presence_penalty, 0.0),
            (self.repetition_penalty, 1.0),
        )
        return any(isinstance(value, Tensor) or value != off for value, off in neutral)


def generate(
    model: StatefulModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 50,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    min_new_tokens: int = 0,
    eos_token_id: int | Sequence[int] | Literal["auto"] | None = "auto",
    pad_token_id: int | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    suppress_tokens: Sequence[int] = (),
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue the given texts: greedily, or by drawing with `do_sample=True`.

    Args:
        model: an `lmfast.models.LanguageModel`, or anything with its `step` and `new_state`.
        ids: (B, T) int64 prompts.
        max_new_tokens: upper limit of tokens added to each row.
        attention_mask: (B, T), nonzero at real tokens; padding may be left or right. Rows of
            different length each continue right after their own last token.
        do_sample: draw from the distribution of `lmfast.ops.sample` rather than take the
            likeliest token.
        temperature, top_k, top_p, min_p: of that distribution.
        frequency_penalty, presence_penalty, repetition_penalty: against repeating generated
            tokens; the prompt does not count. They also act on the greedy choice.
        min_new_tokens: no row ends earlier; until then no end-of-text id is chosen.
        eos_token_id: id or ids that end a row; None = never; "auto" takes
            `model.generation_config.eos_token_id` where there is one, else never.
        pad_token_id: what follows in a row that has ended; the model's `pad_idx`, else an
            end-of-text id, else 0 by default.
        stop_sequences: a row ends when its new tokens end with one of these runs of ids.
        suppress_tokens: ids never chosen, such as the unknown token's.
        use_cache: False runs the whole text through the model for every token; the result is
            the same.
        generator: source of randomness when drawing.
        on_token: called after every step with the new ids (B,), for streaming.

    Returns:
        (B, T + n) int64: the prompts as given and n <= max_new_tokens new ids; n is smaller only
        if every row has ended.

    Raises:
        TypeError: `ids` is no int64 tensor.
        ValueError: an empty prompt, an id outside the vocabulary, or an argument out of range.

    Backends: those of the model.

    Example:
        >>> import torch
        >>> from lmfast.models import RecurrentLanguageModel
        >>> model = RecurrentLanguageModel(50, 16, 1, 0)
        >>> generate(model, torch.tensor([[3, 4]]), 5).shape
        torch.Size([1, 7])
    """
    _check_prompt(ids, attention_mask, model.vocab_size, max_new_tokens)
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    last_id = model.vocab_size - 1
    if any(not 0 <= i <= last_id for i in suppress_tokens):
        raise ValueError(f"suppress_tokens must be in 0..{last_id}, got {list(suppress_tokens)}")
    choose = _Choice(
        do_sample,
        temperature,
        top_k,
        top_p,
        min_p,
        frequency_penalty,
        presence_penalty,
        repetition_penalty,
        generator,
    )
    eos_ids = _eos_ids(model, eos_token_id)
    if pad_token_id is None:
        candidates = [*([] if model.pad_idx is None else [model.pad_idx]), *eos_ids, 0]
        pad_token_id = candidates[0]
    with torch.inference_mode():
        new_ids = _run(
            model,
            ids,
            max_new_tokens,
            lengths=None if attention_mask is None else attention_mask.bool().sum(1),
            prompt=ids if attention_mask is None else _left_aligned(ids, attention_mask.bool()),
            choose=choose,
            stop=StopCondition(ids.shape[0], eos_ids, stop_sequences, ids.device),
            min_new_tokens=min_new_tokens,
            pad_token_id=pad_token_id,
            never=torch.tensor(list(suppress_tokens), dtype=torch.int64, device=ids.device),
            not_yet=torch.tensor(eos_ids, dtype=torch.int64, device=ids.device),
            use_cache=use_cache,
            on_token=on_token,
        )
    # Outside inference mode cat makes an ordinary tensor, one that may go into training again.
    return torch.cat((ids, new_ids), dim=1)


def _run(
    model: StatefulModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | None,
    prompt: Tensor,
    choose: _Choice,
    stop: StopCondition,
    min_new_tokens: int,
    pad_token_id: int,
    never: Tensor,
    not_yet: Tensor,
    use_cache: bool,
    on_token: Callable[[Tensor], None] | None,
) -> Tensor:
    """Return the new ids (B, n)."""
    batch, width = prompt.shape
    chosen: list[Tensor] = []
    if batch == 0 or max_new_tokens == 0:
        return ids[:, :0]
    counts = None
    if choose.needs_counts():
        counts = torch.zeros(batch, model.vocab_size, dtype=torch.int32, device=ids.device)
    state = model.new_state(batch, width + max_new_tokens)
    logits, state = model.step(prompt, state, lengths)
    for count in range(max_new_tokens):
        if len(never):
            logits = logits.index_fill(1, never, float("-inf"))
        if count < min_new_tokens and len(not_yet):
            logits = logits.index_fill(1, not_yet, float("-inf"))
        next_ids = torch.where(stop.finished, pad_token_id, choose(logits, counts))
        chosen.append(next_ids)
        if counts is not None:
            counts[torch.arange(batch, device=ids.device), next_ids] += 1
        if on_token is not None:
            on_token(next_ids)
        finished = stop.update(next_ids, count + 1 >= min_new_tokens)
        if count + 1 == max_new_tokens or bool(finished.all()):
            break
        if use_cache:
            logits, state = model.step(next_ids[:, None], state)
        else:
            text, real = _join(prompt, lengths, torch.stack(chosen, dim=1))
            logits, _ = model.step(text, model.new_state(batch, text.shape[1]), real)
    return torch.stack(chosen, dim=1)


def _join(prompt: Tensor, lengths: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the whole texts, right-padded, and their lengths."""
    text = torch.cat((prompt, torch.zeros_like(new)), dim=1)
    starts = prompt.shape[1] if lengths is None else lengths[:, None]
    columns = starts + torch.arange(new.shape[1], device=new.device).expand_as(new)
    return text.scatter(1, columns, new), None if lengths is None else lengths + new.shape[1]


def _left_aligned(ids: Tensor, real: Tensor) -> Tensor:
    """Move each row's real tokens to the front, in order."""
    order = real.int().argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order)


def _eos_ids(model: StatefulModel, wanted: int | Sequence[int] | str | None) -> list[int]:
    if wanted == "auto":
        config = getattr(model, "generation_config", None)
        wanted = getattr(config, "eos_token_id", None)
    if wanted is None:
        return []
    if isinstance(wanted, str):
        raise ValueError(f'eos_token_id must be an id, ids, None or "auto", got {wanted!r}')
    return [wanted] if isinstance(wanted, int) else list(wanted)


def _check_prompt(
    ids: Tensor, attention_mask: Tensor | None, vocab_size: int, max_new_tokens: int
) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids))}")
    if ids.ndim != 2 or (ids.shape[1] == 0 and ids.shape[0] > 0):
        raise ValueError(f"ids must be (B, T) with T >= 1, got {tuple(ids.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if ids.numel():
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"ids must be in 0..{vocab_size - 1}, got {wrong}")
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of ids {tuple(ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        empty = (~attention_mask.bool().any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"prompt {empty[0]} is empty: its attention_mask is all zero")
