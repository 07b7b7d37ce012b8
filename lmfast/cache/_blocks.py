"""Layers that keep all tokens: rows that share what they have in common, by blocks of columns.

A block is 64 columns of one storage row. A row of the cache normally lies in the storage row of the
same number, and there is no table. Once rows share (beams, forks, a common prompt), the table says
which storage row holds each block of each row; a shared block is never written to: the first row
that appends into it takes a copy of that one block. Who uses a block is counted from the tables
when it matters, so there is no count that could go wrong. In any column at most as many blocks are
live as there are rows, so as many storage rows as the caches that share have together suffice.
"""

from __future__ import annotations

from weakref import WeakSet

import numpy as np
import torch

from lmfast.cache._step import NewTokens, Placement
from lmfast.cache._storage import Storage, on_device
from lmfast.ops._cached_attention_reference import TABLE_BLOCK as BLOCK


class BlockPool:
    """The storage of the layers, and the tables of all caches that share it.

    Args:
        storage: of each layer, all of one shape.
        rows, columns: of that shape.
        device: of the storage.
        bounded: columns are made for as many tokens as needed, not for twice as many as there were.
    """

    def __init__(
        self,
        storage: dict[int, Storage],
        rows: int,
        columns: int,
        device: torch.device,
        bounded: bool,
    ) -> None:
        self.storage = storage
        self.rows, self.columns = rows, columns
        self.device = device
        self.bounded = bounded
        self.users: WeakSet[BlockTable] = WeakSet()

    def make_room(self, rows: int, columns: int) -> None:
        """Grows, amortised, to at least so many rows and columns; what is there keeps its place."""
        if rows <= self.rows and columns <= self.columns:
            return
        if rows > self.rows:
            self.rows = max(rows, self.rows + self.rows // 2)
        if columns > self.columns:
            wanted = columns if self.bounded else max(columns, 2 * self.columns)
            self.columns = -(-wanted // BLOCK) * BLOCK
        storage = self.storage.items()
        self.storage = {layer: s.resized(self.rows, self.columns) for layer, s in storage}

    def uses(self, column: int) -> np.ndarray:
        """How many rows of all caches use each storage row's block of a column."""
        counts = np.zeros(self.rows, dtype=np.int64)
        for user in self.users:
            counts += np.bincount(user.rows_using(column), minlength=self.rows)
        return counts

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "users": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, users=WeakSet())  # tables that are read back join again


class BlockTable:
    """Where the blocks of one cache's rows lie in a pool.

    Args:
        pool: of the storage.
        rows: number of rows.
        table: (rows, blocks) int32, storage row of each block; None: row b is in storage row b.
        live: (rows,) number of blocks in use, from the front; kept only beside a table.
    """

    def __init__(
        self,
        pool: BlockPool,
        rows: int,
        table: np.ndarray | None = None,
        live: np.ndarray | None = None,
    ) -> None:
        self.pool = pool
        self._rows = rows
        self._table = table
        self._live = np.zeros(rows, dtype=np.int64) if live is None else live
        # Up to which column a row may append without asking who else uses the block: what others
        # share of it lies in front of that, and they cannot append to it. One row has this right.
        self._own_until = np.zeros(rows, dtype=np.int64)
        self._forget_views()
        pool.users.add(self)

    def _forget_views(self) -> None:
        self._views: dict[int, Storage] = {}
        self._viewed: dict[int, Storage] = {}

    def rows_using(self, column: int) -> np.ndarray:
        """Storage rows of the blocks this cache uses in a column; it has a table."""
        assert self._table is not None
        if column >= self._table.shape[1]:  # the storage grew for another cache
            return np.zeros(0, dtype=np.int64)
        return self._table[self._live > column, column]

    def place(self, new: NewTokens) -> Placement:
        """Finds room for new tokens, copying the shared blocks that are to be appended to."""
        longest = new.longest if new.reach is new.ends else int(new.reach.max(initial=0))
        self.pool.make_room(self._rows if self._table is None else 0, longest)
        columns = self.pool.columns
        if self._table is None:
            slots = new.positions + np.arange(self._rows)[:, None] * columns
        else:
            self._own(new.starts, new.ends)
            columns = self.pool.columns
            # Of padding, which is not kept, the position may be anything.
            blocks = (new.positions // BLOCK).clip(0, self._table.shape[1] - 1)
            slots = np.take_along_axis(self._table, blocks, 1) * np.int64(columns) + new.positions
        slots = slots.ravel() if new.kept is None else slots.ravel()[new.kept]
        return self._placement(slots, new.reach, longest)

    def _placement(self, slots: np.ndarray, lengths: np.ndarray, longest: int) -> Placement:
        device = self.pool.device
        table, storage = None, self.pool.storage
        if self._table is not None:
            table = on_device(self._table, device)
        else:
            if self._viewed is not storage:
                self._views = {layer: s.first_rows(self._rows) for layer, s in storage.items()}
                self._viewed = storage
            storage = self._views
        return Placement(
            on_device(slots, device),
            on_device(lengths, device),
            longest,
            None,
            table,
            storage,
        )

    def _own(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Gives every row that is longer at its end blocks of its own to append to."""
        table = self._widened()
        counts: dict[int, np.ndarray] = {}
        copies: dict[int, list[tuple[int, int, int]]] = {}  # column -> (from, to, how much)

        def uses(column: int) -> np.ndarray:
            if column not in counts:
                counts[column] = self.pool.uses(column)
            found = counts[column]
            if len(found) < self.pool.rows:
                found = counts[column] = np.pad(found, (0, self.pool.rows - len(found)))
            return found

        def take(row: int, column: int) -> int:
            free = uses(column)
            if row < len(free) and free[row] == 0:  # its usual place
                place = row
            elif (free == 0).any():
                place = int((free == 0).argmax())
            else:  # more rows share the pool than it has
                place = len(free)
                self.pool.make_room(sum(user._rows for user in self.pool.users), 0)
            uses(column)[place] += 1
            return place

        for row in np.flatnonzero((ends > starts) & (ends > self._own_until)).tolist():
            start, last = int(starts[row]), int(ends[row] - 1) // BLOCK
            column, filled = divmod(start, BLOCK)
            if filled:
                place = int(table[row, column])
                if uses(column)[place] > 1:
                    table[row, column] = take(row, column)
                    uses(column)[place] -= 1
                    copies.setdefault(column, []).append((place, int(table[row, column]), filled))
                column += 1
            for new in range(max(column, int(self._live[row])), last + 1):
                table[row, new] = take(row, new)
            self._live[row] = last + 1
            self._own_until[row] = (last + 1) * BLOCK
        for column, moves in copies.items():
            self._copy(column, moves)

    def _copy(self, column: int, moves: list[tuple[int, int, int]]) -> None:
        sources, targets, filled = np.array(moves, dtype=np.int64).T.copy()
        device = self.pool.device
        rows = on_device(sources, device), on_device(targets, device)
        begin = column * BLOCK
        for storage in self.pool.storage.values():
            storage.copy_rows(*rows, begin, begin + int(filled.max()))

    def gathered(self, layer: int, placement: Placement) -> Storage:
        """The layer's contents row by row: views, or copies where rows share."""
        storage = placement.storage[layer]
        if placement.table is None:
            return storage
        return storage.gathered(placement.table.repeat_interleave(BLOCK, 1)[:, : placement.longest])

    def open(self, layer: int, placement: Placement) -> Storage:
        """The storage a layer's tokens of this step go to."""
        return placement.storage[layer]

    def close(self, layer: int, placement: Placement, ends: np.ndarray) -> None:
        """Called when a layer has its tokens."""

    def finish(self) -> None:
        """Called when all layers have theirs."""

    def check_rollback(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Rows can go back to any length."""

    def nbytes(self) -> int:
        """Bytes of memory, that of all who share it."""
        return sum(storage.nbytes() for storage in self.pool.storage.values())

    def select(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Keeps the given rows in the given order; `lengths` are those before."""
        table = self._explicit(lengths)
        distinct = len(np.unique(rows)) == len(rows)
        self._own_until = self._own_until[rows] * distinct
        self._table, self._live, self._rows = table[rows], self._live[rows], len(rows)
        self._settle()

    def fork(self, rows: np.ndarray, lengths: np.ndarray) -> BlockTable:
        """The given rows as a cache of its own, in the same storage."""
        table = self._explicit(lengths)
        return BlockTable(self.pool, len(rows), table[rows], self._live[rows])

    def same_storage(self, other: object) -> bool:
        """Whether the other group's rows can be taken over as they lie."""
        return isinstance(other, BlockTable) and other.pool is self.pool

    def join(self, other: BlockTable, lengths: np.ndarray, their_lengths: np.ndarray) -> None:
        """Takes over the rows of another table of the same pool, which stays as it is."""
        mine, theirs = self._explicit(lengths), other._explicit(their_lengths)
        mine = self._widened()  # writing out the other table may have made room for more columns
        self._table = np.concatenate((mine, theirs))
        self._live = np.concatenate((self._live, other._live))
        self._own_until = np.zeros(len(self._live), dtype=np.int64)  # asked again when they append
        self._rows += other._rows
        self._forget_views()

    def share(self, source: int, rows: np.ndarray, length: int, lengths: np.ndarray) -> None:
        """Lets rows begin with the first `length` tokens of another."""
        table = self._explicit(lengths)
        blocks = -(-length // BLOCK)
        table[rows, :blocks] = table[source, :blocks]
        self._live[rows] = blocks
        self._own_until[rows] = 0
        self._settle()

    def truncate(self, lengths: np.ndarray) -> None:
        """Frees what lies behind the new lengths."""
        self._live = -(-lengths // BLOCK)
        self._own_until[:] = 0
        if self._table is not None:
            self._settle()

    def add(self, count: int) -> None:
        """Adds empty rows."""
        self._rows += count
        none = np.zeros(count, dtype=np.int64)
        self._live = np.concatenate((self._live, none))
        self._own_until = np.concatenate((self._own_until, none))
        if self._table is not None:
            self._table = np.pad(self._table, ((0, count), (0, 0)))
        self._forget_views()

    def alone(self) -> BlockTable:
        """Itself where nobody shares, or a copy with every row in its place."""
        if self._table is None:
            return self
        pool = self.pool
        rows = on_device(self._widened().astype(np.int64), pool.device)
        rows = rows.repeat_interleave(BLOCK, 1)[:, : pool.columns]
        copies = {layer: s.gathered(rows) for layer, s in pool.storage.items()}
        pool = BlockPool(copies, self._rows, pool.columns, pool.device, pool.bounded)
        return BlockTable(pool, self._rows)

    def used_tokens(self, lengths: np.ndarray) -> int:
        """How many tokens are stored, those that rows share counted once."""
        if self._table is None:
            return int(lengths.sum())
        columns = np.arange(self._table.shape[1])
        filled = (lengths[:, None] - columns * BLOCK).clip(0, BLOCK)
        stored = np.zeros((self.pool.rows, len(columns)), dtype=np.int64)
        np.maximum.at(stored, (self._table, columns), filled)
        return int(stored.sum())

    def _explicit(self, lengths: np.ndarray) -> np.ndarray:
        """The table, written out if there was none."""
        if self._table is None:
            self.pool.make_room(self._rows, 0)
            self._table = np.arange(self._rows, dtype=np.int32)[:, None]
            self._live = -(-lengths // BLOCK)
            self._own_until = self._live * BLOCK
        self._forget_views()
        return self._widened()

    def _widened(self) -> np.ndarray:
        """The table with an entry for every block of the storage."""
        assert self._table is not None
        missing = -(-self.pool.columns // BLOCK) - self._table.shape[1]
        if missing > 0:
            self._table = np.pad(self._table, ((0, 0), (0, missing)), mode="edge")
        return self._table

    def _settle(self) -> None:
        """Forgets the table when nobody shares and every row is back in its place."""
        assert self._table is not None
        if len(self.pool.users) > 1 or self.pool.rows < self._rows:
            return
        elsewhere = self._table != np.arange(self._rows)[:, None]
        if not (elsewhere & (np.arange(self._table.shape[1]) < self._live[:, None])).any():
            self._table = None
            self._forget_views()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_views": {}, "_viewed": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.pool.users.add(self)
