"""The cache against a naive one: whatever is done in whatever order, every row holds its tokens.

The naive cache is a list of tensors per row. Caches share storage through forks, rows through
reordering and common prefixes; after every step all of them are compared with their naive twins.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lmfast import ops
from lmfast.generation import KVCache
from lmfast.ops.rope_append import quantised

HEADS, KV_HEADS, DIM = 2, 1, 4
STEPS = st.sampled_from([1, 2, 3, 5, 63, 64, 65, 130])
Row = Tensor  # (layers, 2, Hkv, n, D): what a row holds, as it is stored


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.int8:
        return x.to(dtype).float()
    codes, scales = quantised(x)
    return codes * scales[..., None]


def stored_from(cache: KVCache, layer: int) -> list[int]:
    """From which position on a layer has its rows' tokens: 0 without a window."""
    group = cache._groups[cache._group_of[layer]]
    return group.first.tolist() if hasattr(group, "first") else [0] * cache.batch


class Machine(RuleBasedStateMachine):
    """Each rule does one thing to one of the caches and to its naive twin."""

    dtype = torch.float32
    windows: tuple[int | None, ...] = (None, None)

    def __init__(self) -> None:
        super().__init__()
        self.caches: list[tuple[KVCache, list[Row]]] = []
        self.generator = torch.Generator().manual_seed(0)

    @initialize(
        rows=st.integers(1, 3),
        prompt=st.sampled_from([0, 60, 63, 64, 126]),
        beams=st.integers(1, 3),
        reserve=st.booleans(),
        bounded=st.booleans(),
    )
    def make(self, rows: int, prompt: int, beams: int, reserve: bool, bounded: bool) -> None:
        cache = KVCache(
            len(self.windows),
            rows,
            KV_HEADS,
            DIM,
            dtype=self.dtype,
            window=list(self.windows),
            rows=2 * rows if reserve else None,
            max_length=4000 if bounded else None,
        )
        twin = [self.empty()] * rows
        self.add(cache, twin, prompt, None, None)
        cache.reorder([b for b in range(rows) for _ in range(beams)])
        self.caches.append((cache, [row for row in twin for _ in range(beams)]))

    def empty(self) -> Row:
        return torch.zeros(len(self.windows), 2, KV_HEADS, 0, DIM)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.caches) - 1), label="cache")

    @rule(data=st.data(), steps=STEPS, padding=st.sampled_from([None, "left", "right"]))
    def append(self, data: st.DataObject, steps: int, padding: str | None) -> None:
        cache, rows = self.caches[self.pick(data)]
        counts = None
        if padding is not None:
            counts = [data.draw(st.integers(0, steps), label="count") for _ in rows]
        self.add(cache, rows, steps, counts, padding)

    def add(
        self,
        cache: KVCache,
        rows: list[Row],
        steps: int,
        counts: list[int] | None,
        padding: str | None,
    ) -> None:
        options = {} if counts is None else {"counts": counts, "padding": padding}
        real = [slice(None if counts is None else n) for n in counts or [steps] * len(rows)]
        if padding == "left":
            real = [slice(steps - n, None) for n in counts]
        new = self.normal(len(self.windows), 2, len(rows), KV_HEADS, steps, DIM)
        q = self.normal(len(rows), HEADS, steps, DIM)
        for b, row in enumerate(rows):
            rows[b] = torch.cat((row, as_stored(new[:, :, b, :, real[b]], self.dtype)), dim=3)
        for layer, window in enumerate(self.windows):
            cache.append(layer, *new[layer], **options)
            out = cache.attend(layer, q)
            for b, row in enumerate(rows):
                mine = q[b : b + 1, :, real[b]]
                exact = ops.attention(mine, *row[layer, :, None], window=window, backend="torch")
                found = out[b : b + 1, :, real[b]]
                torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        cache, rows = self.caches[self.pick(data)]
        wanted = [data.draw(st.integers(0, row.shape[3])) for row in rows]
        allowed = True
        for layer, window in enumerate(self.windows):
            first = stored_from(cache, layer)
            if window is not None:
                needed = [max(0, n - (window - 1)) for n in wanted]
                pairs = zip(first, needed, wanted, strict=True)
                allowed &= all(f <= n or w == 0 for f, n, w in pairs)
        if not allowed:
            with pytest.raises(ValueError, match="with a window of"):
                cache.truncate(wanted)
            return
        cache.truncate(wanted)
        rows[:] = [row[:, :, :, :n] for row, n in zip(rows, wanted, strict=True)]

    @rule(data=st.data())
    def roll_back_a_little(self, data: st.DataObject) -> None:
        cache, rows = self.caches[self.pick(data)]
        steps = data.draw(st.integers(1, 16))
        self.add(cache, rows, steps, None, None)
        wanted = [row.shape[3] - data.draw(st.integers(0, steps)) for row in rows]
        cache.truncate(wanted)
        rows[:] = [row[:, :, :, :n] for row, n in zip(rows, wanted, strict=True)]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        cache, rows = self.caches[self.pick(data)]
        index = st.integers(0, len(rows) - 1)
        chosen = data.draw(st.lists(index, min_size=1, max_size=5), label="rows")
        cache.reorder(chosen)
        rows[:] = [rows[i] for i in chosen]

    @rule(data=st.data())
    def search_with_beams(self, data: st.DataObject) -> None:
        cache, rows = self.caches[self.pick(data)]
        for _ in range(3):
            chosen = [data.draw(st.integers(0, len(rows) - 1)) for _ in rows]
            cache.reorder(chosen)
            rows[:] = [rows[i] for i in chosen]
            self.add(cache, rows, 1, None, None)

    @rule(data=st.data())
    def try_two_ways(self, data: st.DataObject) -> None:
        cache, rows = self.caches[self.pick(data)]
        for steps in (1, 2):
            other, twin = cache.fork(), list(rows)
            self.add(other, twin, steps, None, None)
            self.add(cache, rows, steps, None, None)

    @precondition(lambda self: len(self.caches) < 4)
    @rule(data=st.data(), copies=st.integers(1, 3))
    def fork(self, data: st.DataObject, copies: int) -> None:
        cache, rows = self.caches[self.pick(data)]
        self.caches.append((cache.fork(copies), [row for row in rows for _ in range(copies)]))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.caches[self.pick(data)]

    @rule(data=st.data(), pickled=st.booleans())
    def copy(self, data: st.DataObject, pickled: bool) -> None:
        index = self.pick(data)
        cache, rows = self.caches[index]
        again = pickle.loads(pickle.dumps(cache)) if pickled else copy.deepcopy(cache)
        self.caches[index] = again, rows

    @rule(data=st.data())
    def share_prefix(self, data: st.DataObject) -> None:
        cache, rows = self.caches[self.pick(data)]
        source = data.draw(st.integers(0, len(rows) - 1), label="source")
        others = st.integers(0, len(rows) - 1).filter(lambda b: b != source)
        chosen = data.draw(st.lists(others, unique=True, max_size=3)) if len(rows) > 1 else []
        length = data.draw(st.integers(0, rows[source].shape[3]), label="length")
        if any(
            w is not None
            and length > 0
            and stored_from(cache, i)[source] > max(0, length - (w - 1))
            for i, w in enumerate(self.windows)
        ):
            with pytest.raises(ValueError, match="with a window of"):
                cache.share_prefix(source, chosen, length)
            return
        cache.share_prefix(source, chosen, length)
        for b in chosen:
            rows[b] = rows[source][:, :, :, :length]

    @rule(data=st.data(), count=st.integers(0, 2))
    def add_rows(self, data: st.DataObject, count: int) -> None:
        cache, rows = self.caches[self.pick(data)]
        assert list(cache.add_rows(count)) == list(range(len(rows), len(rows) + count))
        rows += [self.empty()] * count

    @rule(data=st.data())
    def remove_rows(self, data: st.DataObject) -> None:
        cache, rows = self.caches[self.pick(data)]
        gone = data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=len(rows) - 1))
        cache.remove_rows(sorted(gone))
        rows[:] = [row for b, row in enumerate(rows) if b not in gone]

    @invariant()
    def all_rows_hold_their_tokens(self) -> None:
        for cache, rows in self.caches:
            assert cache.lengths.tolist() == [row.shape[3] for row in rows]
            for layer in range(len(self.windows)):
                stored = cache.contents(layer, torch.float32)
                first = cache.first(layer).tolist()
                for b, row in enumerate(rows):
                    for found, expected in zip(stored, row[layer], strict=True):
                        held = expected[:, first[b] :]
                        assert torch.equal(found[b, :, : held.shape[1]].float(), held)


class Bfloat16(Machine):
    dtype = torch.bfloat16


class Int8(Machine):
    dtype = torch.int8
    windows = (None, 7)


class Windowed(Machine):
    windows = (7, None, 90)


for machine in (Machine, Bfloat16, Int8, Windowed):
    machine.TestCase.settings = settings(
        max_examples=25,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
TestPlain = Machine.TestCase
TestBfloat16 = Bfloat16.TestCase
TestInt8 = Int8.TestCase
TestWindowed = Windowed.TestCase
