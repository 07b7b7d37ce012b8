"""Deciding per row when generation ends, on the device where it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StopCondition:
    """End-of-text ids and stop sequences of several ids, checked for each row by itself.

    Args:
        batch: number B of rows.
        eos_ids: ids that end a row.
        sequences: runs of ids that end a row as soon as its new tokens end with one of them.
        device: where the generated ids are.

    Raises:
        ValueError: a stop sequence is empty.

    Example:
        >>> stop = StopCondition(1, eos_ids=[], sequences=[[7, 8]], device="cpu")
        >>> [stop.update(torch.tensor([i])).item() for i in (8, 7, 8)]
        [False, False, True]
    """

    def __init__(
        self,
        batch: int,
        eos_ids: Sequence[int],
        sequences: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> None:
        if any(len(sequence) == 0 for sequence in sequences):
            raise ValueError("a stop sequence must have at least one id")
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self._sequences = [torch.tensor(list(s), device=device) for s in sequences]
        longest = max((len(s) for s in sequences), default=0)
        self._tail = torch.full((batch, longest), -1, dtype=torch.int64, device=device)

    def update(self, new_ids: Tensor, count_as_end: bool = True) -> Tensor:
        """Take the next ids (B,) and return which rows have ended (B,) bool.

        With `count_as_end` false they are only remembered, for a minimum length.
        """
        if self._sequences:
            self._tail = torch.cat((self._tail[:, 1:], new_ids[:, None]), dim=1)
        if count_as_end:
            ended = torch.isin(new_ids, self._eos)
            for sequence in self._sequences:
                ended |= (self._tail[:, -len(sequence) :] == sequence).all(dim=1)
            self.finished = self.finished | ended
        return self.finished
