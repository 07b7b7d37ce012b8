"""States that are not caches of keys: what a recurrent model remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RecurrentState:
    """The state tensor of a recurrent model, and what is done to its rows.

    Args:
        tensor: (L, B, E), rows in the second dimension.

    Example:
        >>> state = RecurrentState(torch.arange(3.0).view(1, 3, 1))
        >>> state.reorder([2, 0])
        >>> state.tensor.flatten().tolist()
        [2.0, 0.0]
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.tensor.shape[1]

    def reorder(self, rows: Any) -> None:
        """Keep the given rows in the given order; one may be dropped or occur several times."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.tensor.device)
        self.tensor = self.tensor.index_select(1, index)

    def fork(self, copies: int = 1) -> RecurrentState:
        """Return a state with every row `copies` times, next to each other."""
        return RecurrentState(self.tensor.repeat_interleave(copies, 1))

    def sibling(self, batch: int) -> RecurrentState:
        """Return a state of `batch` empty rows."""
        layers, _, width = self.tensor.shape
        return RecurrentState(self.tensor.new_zeros(layers, batch, width))

    def append_rows(self, other: RecurrentState) -> None:
        """Take over the rows of another state, behind the own ones."""
        self.tensor = torch.cat((self.tensor, other.tensor), 1)
