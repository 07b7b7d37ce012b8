"""The short way of a step of one token per row.

While decoding a small model, a step is 100 us of work, and looking up where its tokens go, which
`_whole_step` does for any step and any cache, is as much again. For the usual cache, all tokens
kept and no rows that share, all of it is a few sums in arrays that stay: 10 us.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmfast.cache import KVCache
from lmfast.cache._blocks import BlockTable

NO_TABLE = torch.empty((0, 0), dtype=torch.int32)


class Lane:
    """The arrays of steps of one cache, `steps` of one token per row at a time.

    Args:
        batch: B.
        steps: of a call.
        groups: of layers that the program tells apart; all lie in the same places.
    """

    def __init__(self, batch: int, steps: int, groups: int) -> None:
        self.batch, self.steps = batch, steps
        self._rows = np.arange(batch)
        self._columns = -1
        self._base = self._rows
        self._ahead = np.arange(steps)[:, None]
        self._positions = np.zeros((steps, batch), dtype=np.int64)
        self._slots = np.zeros((steps, batch), dtype=np.int64)
        self._spans = np.zeros((groups, batch, 4), dtype=np.int64)
        self._spans[:, :, 0] = self._rows
        self._spans[:, :, 1] = 1
        self.positions = torch.from_numpy(self._positions)
        self.wanted = torch.arange(batch)
        self.spans = torch.from_numpy(self._spans)
        self.slots = [torch.from_numpy(self._slots)] * groups
        self.tables = [NO_TABLE] * groups
        self._storage: object = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.scales: list[Tensor | None] = []

    def begin(self, cache: KVCache) -> bool:
        """Find room for the steps; False, and nothing done, where it takes the long way."""
        group = cache._groups[0]
        if len(cache._groups) > 1 or not isinstance(group, BlockTable) or group._table is not None:
            return False
        longest, room = cache._longest + self.steps, cache.max_length
        if cache._next_layer != 0 or (room is not None and longest > room):
            return False
        pool = group.pool
        pool.make_room(self.batch, longest)
        if self._storage is not pool.storage:
            layers = [pool.storage[i] for i in range(cache.num_layers)]
            self.keys = [s.keys for s in layers]
            self.values = [s.values for s in layers]
            if cache.dtype == torch.int8:
                self.scales = [t for s in layers for t in (s.key_scales, s.value_scales)]
            self._storage = pool.storage
        if self._columns != pool.columns:
            self._columns = pool.columns
            self._base = self._rows * pool.columns
        starts = cache._lengths
        np.add(starts, self._ahead, out=self._positions)
        np.add(self._positions, self._base, out=self._slots)
        self._spans[:, :, 2] = starts
        self._spans[:, :, 3] = starts + 1
        cache._forget_step()
        return True

    def finish(self, cache: KVCache, done: int) -> None:
        """So many of the steps are stored."""
        cache._lengths = cache._lengths + done
        cache._longest += done
