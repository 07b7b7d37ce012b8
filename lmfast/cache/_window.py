"""Layers with a sliding window: storage for what can still be seen, and no more.

Row b holds the tokens from position first[b] on, in columns from 0. When the columns are full, the
last ones move to the front: every `slack` tokens window - 1 are copied, so a token costs a constant
number of copies, keys stay in order and neighbours in memory, and an operator reads them as if they
were all there are, because a window and a causal mask only look at differences of positions.
"""

from __future__ import annotations

import numpy as np
import torch

from lmfast.cache._step import NewTokens, Placement
from lmfast.cache._storage import Storage, on_device

# Tokens behind the window that are kept so that as many of the last ones can be taken back, as
# speculative decoding does.
ROLLBACK = 16


def columns_for(window: int) -> int:
    """Columns of storage: 1/8 more than are kept, so a token costs the copying of 8 others.

    Copying is 1/8 of reading the window once per `window / 8` tokens: 8 / window of attention's
    own traffic, below 2 % at 512.
    """
    kept = window - 1 + ROLLBACK
    return -(-(kept + max(64, window // 8)) // 64) * 64


class WindowedLayers:
    """The storage of layers with one window, each row of the cache in the row of the same number.

    Args:
        storage: of each layer, (rows, Hkv, columns_for(window), D).
        rows: number of rows, all empty.
        window: how many keys a query sees, itself included.
        device: of the storage.
    """

    def __init__(
        self, storage: dict[int, Storage], rows: int, window: int, device: torch.device
    ) -> None:
        self.storage = storage
        self.window = window
        self.device = device
        self.first = np.zeros(rows, dtype=np.int64)
        self._columns = columns_for(window)
        self._kept = window - 1 + ROLLBACK
        self._scratch: dict[int, Storage] = {}
        self._after = self.first  # `first` when the step is complete
        self._overwritten = False  # by a step that did not fit and is not complete

    def place(self, new: NewTokens) -> Placement:
        """Finds room for new tokens, moving the last ones to the front where there is none.

        A step with more tokens than fit, a long prompt, goes to memory of its own, layer by layer;
        what the window still sees at its end is copied from there.
        """
        longest = int((new.reach - self.first).max(initial=0))
        storage, self._scratch = self.storage, {}
        if longest > self._columns:
            self._compact(new.starts)
            longest = int((new.reach - self.first).max(initial=0))
        if longest > self._columns:
            storage = self._scratch = {}
        self._after = self.first
        if storage is not self.storage:
            self._after = np.maximum(new.ends - self._kept, self.first)
        width = max(longest, self._columns)
        slots = new.positions - self.first[:, None] + np.arange(len(self.first))[:, None] * width
        slots = slots.ravel() if new.kept is None else slots.ravel()[new.kept]
        return Placement(
            on_device(slots, self.device),
            on_device(new.reach - self.first, self.device),
            longest,
            self.first,
            None,
            storage,
        )

    def open(self, layer: int, placement: Placement) -> Storage:
        """The storage a layer's tokens of this step go to."""
        if placement.storage is self.storage:
            return self.storage[layer]
        own = self.storage[layer]
        rows, heads, _, dim = own.keys.shape
        shape = (rows, heads, placement.longest, dim)
        scratch = Storage.make(shape, own.keys.dtype, self.device)
        scratch.take(own, slice(None), 0, 0, min(self._columns, placement.longest))
        placement.storage.clear()  # the previous layer's
        placement.storage[layer] = scratch
        return scratch

    def close(self, layer: int, placement: Placement, ends: np.ndarray) -> None:
        """Called when a layer has its tokens."""
        if placement.storage is not self.storage:
            self._overwritten = True
            self._move(self.storage[layer], placement.storage[layer], ends, self._after)

    def finish(self) -> None:
        """Called when all layers have theirs."""
        self.first, self._overwritten = self._after, False

    def _compact(self, lengths: np.ndarray) -> None:
        first = np.maximum(lengths - self._kept, self.first)
        for storage in self.storage.values():
            self._move(storage, storage, lengths, first)
        self.first = first

    def _move(
        self, target: Storage, source: Storage, lengths: np.ndarray, first: np.ndarray
    ) -> None:
        """Copies what lies from `first` on in each row of the source to the target's front."""
        begins, counts = (first - self.first).tolist(), (lengths - first).tolist()
        if len(set(begins)) == 1 and len(set(counts)) == 1:
            target.take(source, slice(None), begins[0], 0, counts[0])
            return
        for row, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            target.take(source, slice(row, row + 1), begin, 0, count)

    def gathered(self, layer: int, placement: Placement) -> Storage:
        """The layer's contents row by row."""
        return placement.storage[layer]

    def check_rollback(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """ValueError if rows cannot go back to these lengths: the window would miss tokens."""
        if self._overwritten and lengths.any():
            raise ValueError(
                "a step longer than the window was interrupted between layers, and what they held "
                "is lost: reset the cache"
            )
        needed = (lengths - (self.window - 1)).clip(0)
        lost = np.flatnonzero((self.first[rows] > needed) & (lengths > 0))
        if len(lost):
            row, length = int(rows[lost[0]]), int(lengths[lost[0]])
            raise ValueError(
                f"row {row} cannot go back to {length} tokens: with a window of {self.window} the "
                f"keys before position {int(self.first[row])} are gone; to 0 it can"
            )

    def truncate(self, lengths: np.ndarray) -> None:
        """Forgets what lies behind the new lengths."""
        self._overwritten = False
        self.first = np.where(lengths > 0, self.first, 0)

    def select(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Keeps the given rows in the given order, by copying: a window is short."""
        self.storage = self._selected(rows)
        self.first = self.first[rows]

    def fork(self, rows: np.ndarray, lengths: np.ndarray) -> WindowedLayers:
        """The given rows as a cache of its own, copied."""
        other = WindowedLayers(self._selected(rows), len(rows), self.window, self.device)
        other.first = self.first[rows]
        return other

    def same_storage(self, other: object) -> bool:
        """Whether the other group has the same layers; its rows are copied anyway."""
        return isinstance(other, WindowedLayers) and other.storage.keys() == self.storage.keys()

    def join(self, other: WindowedLayers, lengths: np.ndarray, their_lengths: np.ndarray) -> None:
        """Copies the rows of another group of the same layers behind the own ones."""
        storage = self.storage.items()
        self.storage = {layer: s.joined(other.storage[layer]) for layer, s in storage}
        self.first = np.concatenate((self.first, other.first))

    def _selected(self, rows: np.ndarray) -> dict[int, Storage]:
        index = on_device(rows, self.device)
        return {layer: storage.selected(index) for layer, storage in self.storage.items()}

    def share(self, source: int, rows: np.ndarray, length: int, lengths: np.ndarray) -> None:
        """Lets rows begin with the first `length` tokens of another, copied."""
        count = max(length - int(self.first[source]), 0)
        targets = on_device(rows, self.device)
        sources = on_device(np.full(len(rows), source), self.device)
        for storage in self.storage.values():
            storage.copy_rows(sources, targets, 0, count)
        self.first = self.first.copy()
        self.first[rows] = self.first[source]

    def add(self, count: int) -> None:
        """Adds empty rows."""
        self.first = np.concatenate((self.first, np.zeros(count, dtype=np.int64)))
        rows = len(self.first)
        storage = self.storage.items()
        self.storage = {layer: s.resized(rows, self._columns) for layer, s in storage}

    def used_tokens(self, lengths: np.ndarray) -> int:
        """How many tokens are stored."""
        return int((lengths - self.first).sum())

    def nbytes(self) -> int:
        """Bytes of memory, the temporary memory of a long step included."""
        stored = (*self.storage.values(), *self._scratch.values())
        return sum(storage.nbytes() for storage in stored)
