"""The rows of a cache: their lengths, and dropping, repeating, sharing and shortening them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lmfast.cache._blocks import BlockTable
from lmfast.cache._step import Placement, Step, check_integer, integers
from lmfast.cache._storage import on_device
from lmfast.cache._window import WindowedLayers
from lmfast.ops._storage import STORAGE_DTYPES

Group = BlockTable | WindowedLayers  # layers whose tokens lie in the same places
Cache = TypeVar("Cache", bound="CachedRows")


class CacheMemory(NamedTuple):
    """Bytes of a cache.

    Attributes:
        allocated: of all its storage, which caches made by `fork` share. On a CPU the operating
            system provides it when it is first written to.
        used: of the tokens it holds; those that rows share count once.
    """

    allocated: int
    used: int


class CachedRows:
    """What of a cache does not depend on layers.

    Args:
        groups: of layers, all with `batch` empty rows.
        group_of: the group of each layer.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __init__(self, groups: list[Group], group_of: list[int], batch: int) -> None:
        self._groups = groups
        self._group_of = group_of
        self._set_lengths(np.zeros(batch, dtype=np.int64))

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self._lengths)

    @property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return self._longest

    @property
    def lengths(self) -> Tensor:
        """Number of tokens per row, (B,) int64 on the cache's device."""
        return on_device(self._lengths.copy(), self.device)

    @property
    def offset(self) -> int | Tensor:
        """Position of the next token: an int if it is the same for all rows, else (B,) int64."""
        uniform = (self._lengths == self._longest).all()
        return self._longest if uniform else self.lengths

    def memory(self) -> CacheMemory:
        """Bytes allocated and used, scales included."""
        allocated = used = 0
        for index, group in enumerate(self._groups):
            allocated += group.nbytes()
            layers = self._group_of.count(index)
            per_head = 2 * (self.head_dim * self.dtype.itemsize + 4 * (self.dtype == torch.int8))
            used += group.used_tokens(self._lengths) * layers * self.num_kv_heads * per_head
        return CacheMemory(allocated, used)

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forget everything behind the given length of all rows, or of each row.

        A step that was interrupted, some of its layers done, is forgotten as well. Of one length
        for all, rows that are shorter stay as they are.

        Raises:
            TypeError: lengths are not integers.
            ValueError: a length is negative, one of several is beyond its row's end, there is not
                one per row, or a layer with a window no longer has what would be seen from there.
        """
        if isinstance(lengths, int) and not isinstance(lengths, bool):
            wanted = np.minimum(self._lengths, lengths)
        else:
            wanted = integers("lengths", lengths)
            if len(wanted) != self.batch:
                raise ValueError(f"lengths must have {self.batch} entries, got {len(wanted)}")
            beyond = np.flatnonzero(wanted > self._lengths)
            if len(beyond):
                row = int(beyond[0])
                raise ValueError(f"row {row} has {self._lengths[row]} tokens, not {wanted[row]}")
        if (wanted < 0).any() or (isinstance(lengths, int) and lengths < 0):
            raise ValueError(f"lengths must not be negative, got {lengths}")
        for group in self._groups:
            group.check_rollback(np.arange(self.batch), wanted)
        for group in self._groups:
            group.truncate(wanted)
        self._set_lengths(wanted)

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.truncate(0)

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Keep the given rows in the given order; a row may be dropped or occur several times.

        Nothing is copied: rows that occur several times share their blocks until they go on.

        Raises:
            TypeError: rows are not integers.
            IndexError: a row does not exist.
        """
        chosen = self._rows(rows)
        self._check_whole()
        if not np.array_equal(chosen, np.arange(self.batch)):
            for group in self._groups:
                group.select(chosen, self._lengths)
        self._set_lengths(self._lengths[chosen])

    def fork(self: Cache, copies: int = 1) -> Cache:
        """Return a new cache in which every row occurs `copies` times, next to each other.

        Both caches share what they have now and go on independently.
        """
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        self._check_whole()
        rows = np.repeat(np.arange(self.batch), copies)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._groups = [group.fork(rows, self._lengths) for group in self._groups]
        other._set_lengths(self._lengths[rows])
        self._forget_step()
        return other

    def sibling(self: Cache, batch: int) -> Cache:
        """Return a cache of `batch` empty rows in the same storage: `append_rows` takes them."""
        other = self.fork()
        other.reorder([])
        other.add_rows(batch)
        return other

    def append_rows(self: Cache, other: Cache) -> None:
        """Take over the rows of a cache made by `sibling` or `fork`, behind the own ones.

        Nothing is copied but layers with a window. The other cache is left without rows.

        Raises:
            ValueError: the other one is this cache or has storage of its own.
        """
        if other is self or not all(
            mine.same_storage(theirs)
            for mine, theirs in zip(self._groups, other._groups, strict=True)
        ):
            raise ValueError("other must be made from this cache by sibling or fork")
        for cache in (self, other):
            cache._check_whole()
        for mine, theirs in zip(self._groups, other._groups, strict=True):
            mine.join(theirs, self._lengths, other._lengths)  # type: ignore[arg-type]
        lengths = np.concatenate((self._lengths, other._lengths))
        other.reorder([])
        self._set_lengths(lengths)

    def share_prefix(self, source: int, rows: Sequence[int] | Tensor, length: int) -> None:
        """Let rows begin with the first `length` tokens of another, whatever they were before.

        Raises:
            TypeError: rows are not integers.
            IndexError: a row does not exist.
            ValueError: the source is shorter, is among the rows, or a layer with a window no
                longer has those tokens.
        """
        chosen = self._rows(rows)
        origin = int(self._rows([source])[0])
        if origin in chosen:
            raise ValueError(f"row {origin} cannot be source and target, truncate it instead")
        if not 0 <= length <= self._lengths[origin]:
            raise ValueError(
                f"length must be from 0 to the source's {self._lengths[origin]}, got {length}"
            )
        for group in self._groups:
            group.check_rollback(np.array([origin]), np.array([length]))
        for group in self._groups:
            group.share(origin, chosen, length, self._lengths)
        lengths = self._lengths.copy()
        lengths[chosen] = length
        self._set_lengths(lengths)

    def add_rows(self, count: int = 1) -> range:
        """Add empty rows behind the others and return their indices."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        self._check_whole()
        for group in self._groups:
            group.add(count)
        self._set_lengths(np.concatenate((self._lengths, np.zeros(count, dtype=np.int64))))
        return range(self.batch - count, self.batch)

    def remove_rows(self, rows: Sequence[int] | Tensor) -> None:
        """Drop rows; those behind them move up.

        Raises:
            TypeError: rows are not integers.
            IndexError: a row does not exist.
        """
        self.reorder(np.delete(np.arange(self.batch), self._rows(rows)).tolist())

    def _rows(self, rows: Sequence[int] | Tensor) -> np.ndarray:
        chosen = integers("rows", rows)
        if ((chosen < 0) | (chosen >= self.batch)).any():
            raise IndexError(f"rows must be in 0..{self.batch - 1}, got {chosen.tolist()}")
        return chosen

    def _check_whole(self) -> None:
        for group in self._groups:
            group.check_rollback(np.arange(self.batch), self._lengths)

    def _set_lengths(self, lengths: np.ndarray) -> None:
        self._lengths = lengths
        self._longest = int(lengths.max(initial=0))
        self._forget_step()

    def _forget_step(self) -> None:
        self._step: Step | None = None
        self._placements: list[Placement] = []  # of each group
        self._next_layer = 0

    def __getstate__(self) -> dict[str, Any]:
        groups = [
            group.alone() if isinstance(group, BlockTable) else group for group in self._groups
        ]
        return {**self.__dict__, "_groups": groups, "_step": None, "_placements": []}


def check_sizes(
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    max_length: int | None,
    dtype: torch.dtype,
    rows: int,
) -> None:
    """TypeError or ValueError for arguments no cache can be made with."""
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in (
        *sizes.items(),
        ("batch", batch),
        ("max_length", max_length),
        ("rows", rows),
    ):
        if size is not None:
            check_integer(name, size)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if batch < 0:
        raise ValueError(f"batch must not be negative, got {batch}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 or None, got {max_length}")
    if rows < batch:
        raise ValueError(f"rows must be at least the batch {batch}, got {rows}")
    if dtype not in STORAGE_DTYPES:
        names = ", ".join(str(d) for d in STORAGE_DTYPES)
        raise TypeError(f"dtype must be one of {names}, got {dtype}")


def layer_windows(window: int | Sequence[int | None] | None, num_layers: int) -> list[int | None]:
    """The window of each layer."""
    if isinstance(window, Sequence) and not isinstance(window, str):
        windows = list(window)
    else:
        windows = [window] * num_layers
    for w in windows:
        if w is not None:
            check_integer("window", w)
    if len(windows) != num_layers:
        raise ValueError(f"window must have {num_layers} entries, got {len(windows)}")
    if any(w is not None and w < 1 for w in windows):
        raise ValueError(f"window must be at least 1 or None, got {window}")
    return windows
