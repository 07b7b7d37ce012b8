"""Deciding per row when generation ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.text import TextStream


class StopOnDevice:
    """End-of-text ids and stop sequences, compared where the ids are: nothing waits for a GPU.

    Args:
        batch: number B of rows.
        eos_ids: ids that end a row.
        sequences: runs of ids that end a row as soon as its new tokens end with one of them.
        device: where the generated ids are.

    Example:
        >>> stop = StopOnDevice(1, eos_ids=[], sequences=[[7, 8]], device="cpu")
        >>> [stop.update(torch.tensor([i]))[0].item() for i in (8, 7, 8)]
        [False, False, True]
    """

    def __init__(
        self,
        batch: int,
        eos_ids: Sequence[int],
        sequences: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> None:
        self._finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self._sequences = [torch.tensor(list(s), device=device) for s in sequences]
        longest = max((len(s) for s in sequences), default=0)
        self._tail = torch.full((batch, longest), -1, dtype=torch.int64, device=device)

    def update(self, new_ids: Tensor, count_as_end: bool = True) -> Tensor:
        """Take the next ids (B,) and return which rows have ended (B,) bool.

        With `count_as_end` false they are only remembered, for a minimum length.
        """
        if self._sequences:
            self._tail.copy_(torch.cat((self._tail[:, 1:], new_ids[:, None]), dim=1))
        if count_as_end:
            ended = (new_ids[:, None] == self._eos).any(dim=1)
            for sequence in self._sequences:
                ended |= (self._tail[:, -len(sequence) :] == sequence).all(dim=1)
            self._finished |= ended
        return self._finished

    def state(self) -> list[Tensor]:
        """Return the tensors that `update` changes, in place."""
        return [self._finished, self._tail]


class StopOfRow:
    """End-of-text ids, stop sequences and stop strings of one row, on the host.

    Args:
        eos_ids: ids that end the row.
        sequences: runs of ids that end it as soon as the new tokens end with one of them.
        strings: texts that end it with the token that completes one.
        tokenizer: decodes for them.

    Example:
        >>> stop = StopOfRow([], [[7, 8]])
        >>> [stop.ends(i) for i in (8, 7, 8)]
        [False, False, True]
    """

    def __init__(
        self,
        eos_ids: Sequence[int],
        sequences: Sequence[Sequence[int]] = (),
        strings: Sequence[str] = (),
        tokenizer: Any = None,
    ) -> None:
        self._eos = frozenset(eos_ids)
        self._sequences = [list(sequence) for sequence in sequences]
        self._longest = max((len(s) for s in self._sequences), default=0)
        self._tail: list[int] = []
        self._strings = list(strings)
        self._kept = max((len(s) for s in self._strings), default=1) - 1
        self._stream = TextStream(tokenizer) if self._strings else None
        self._text = ""

    def ends(self, new_id: int, count_as_end: bool = True) -> bool:
        """Take the next id and return whether the row ends with it."""
        ended = new_id in self._eos
        if self._longest:
            self._tail = (self._tail + [new_id])[-self._longest :]
            ended = ended or any(self._tail[-len(s) :] == s for s in self._sequences)
        if self._stream is not None:
            known = len(self._text)
            text = self._text + self._stream.push(new_id)
            # Not those that were whole before, in a row that could not end yet.
            ended = ended or any(
                text.find(s, max(0, known - len(s) + 1)) >= 0 for s in self._strings
            )
            self._text = text[max(0, len(text) - self._kept) :]
        return ended and count_as_end


def completes(
    ids: Sequence[int],
    eos_ids: Sequence[int],
    sequences: Sequence[Sequence[int]],
    strings: Sequence[str],
    tokenizer: Any,
) -> bool:
    """Whether the last of new ids ends a row that had not ended before it."""
    if ids[-1] in eos_ids:
        return True
    if any(list(ids[-len(s) :]) == list(s) for s in sequences):
        return True
    if not strings:
        return False
    text, before = tokenizer.decode(list(ids)), tokenizer.decode(list(ids[:-1]))
    return any(text.find(s, max(0, len(before) - len(s) + 1)) >= 0 for s in strings)
