"""Prompts: checked, their padding moved to the end, cut to the context there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmfast.generation.options import GenerationOptions


@dataclass(frozen=True)
class Prompts:
    """Prompts with their real tokens in front.

    Attributes:
        ids: (B, W) int64.
        lengths: number of real tokens of each row, on the host.
    """

    ids: Tensor
    lengths: list[int]

    @property
    def ragged(self) -> bool:
        """Whether a row has padding."""
        return any(length != self.ids.shape[1] for length in self.lengths)

    def counts(self) -> Tensor | None:
        """The lengths as a runner takes them."""
        if not self.ragged:
            return None
        return torch.tensor(self.lengths, device=self.ids.device)

    def mask(self) -> Tensor:
        """(B, W) bool, true at real tokens."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return columns < torch.tensor(self.lengths, device=self.ids.device)[:, None]

    def rows(self) -> list[list[int]]:
        """The real tokens of each row."""
        rows = self.ids.tolist()
        return [row[:length] for row, length in zip(rows, self.lengths, strict=True)]

    def repeated(self, times: int) -> Prompts:
        """Every row several times, next to each other."""
        if times == 1:
            return self
        lengths = [length for length in self.lengths for _ in range(times)]
        return Prompts(self.ids.repeat_interleave(times, 0), lengths)

    def without(self, count: int) -> Prompts:
        """What follows the first `count` tokens of every row."""
        return Prompts(self.ids[:, count:], [length - count for length in self.lengths])

    def last(self, count: int, most: int | None = None) -> Prompts:
        """The last `count` tokens of rows that have more than `most`, by default more than that."""
        most = count if most is None else most
        if max(self.lengths, default=0) <= most:
            return self
        rows = [row[-count:] if len(row) > most else row for row in self.rows()]
        return from_rows(rows, self.ids.device)

    def common(self) -> int:
        """How many tokens all rows begin with, one less than the shortest at most."""
        shortest = min(self.lengths) - 1
        same = (self.ids[:, :shortest] == self.ids[:1, :shortest]).all(0)
        return int(same.long().cumprod(0).sum()) if shortest > 0 else 0


def from_rows(rows: list[list[int]], device: torch.device) -> Prompts:
    """Prompts of the given tokens, which are known to be good."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    return Prompts(ids, [len(row) for row in rows])


def check_prompts(ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Prompts:
    """Return the prompts with padding at the end; what is masked in between is left out.

    Raises:
        TypeError: `ids` is no int64 tensor, or `attention_mask` no tensor.
        ValueError: an empty prompt, an id outside the vocabulary, a mask of another shape.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids))}")
    if ids.ndim != 2 or (ids.shape[1] == 0 and ids.shape[0] > 0):
        raise ValueError(f"ids must be (B, T) with T >= 1, got {tuple(ids.shape)}")
    if ids.numel():
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"ids must be in 0..{vocab_size - 1}, got {wrong}")
    if attention_mask is None:
        return Prompts(ids, [ids.shape[1]] * len(ids))
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of ids {tuple(ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    real = attention_mask.bool()
    lengths = real.sum(1).tolist()
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} is empty: its attention_mask is all zero")
    order = real.int().argsort(dim=1, descending=True, stable=True)
    return Prompts(ids.gather(1, order)[:, : max(lengths, default=0)], lengths)


def fit(prompts: Prompts, options: GenerationOptions, window: int | None) -> Prompts:
    """Cut prompts to a context window as the policy says.

    Raises:
        ValueError: they do not fit and the policy is "error".
    """
    longest = max(prompts.lengths, default=0)
    # The last new token is not fed to the model.
    if window is None or longest + options.max_new_tokens - 1 <= window:
        return prompts
    if options.context_policy == "slide":
        return prompts.last(window // 2, most=window)
    room = window + 1 - options.max_new_tokens
    if options.context_policy == "error" or room < 1:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={options.max_new_tokens} do not fit "
            f"into a context of {window} tokens: shorten them, or set context_policy to "
            + ('"slide"' if room < 1 else '"slide" or "truncate"')
        )
    return prompts.last(room)


def with_new(ids: Tensor, new: Tensor, copies: int) -> Tensor:
    """Outside inference mode cat makes an ordinary tensor, one that may go into training again."""
    ids = ids.repeat_interleave(copies, 0) if copies > 1 else ids
    return torch.cat((ids, new), dim=1)
