"""Runs a packed decoder step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lmfast.cache import KVCache, _whole_step
from lmfast.generation.engine.decoding import NO_TABLE, Lane
from lmfast.generation.engine.operators import engine_greedy, engine_step
from lmfast.generation.engine.plan import CannotPack, Plan
from lmfast.generation.engine.program import Packed, pack
from lmfast.generation.engine.rounded_rows import (
    ROUNDED_FROM,
    rounding,
    short_rows,
    step_apart,
)
from lmfast.generation.engine.watch import Watch

# Tokens of a prompt that go through the layers together: their rows stay in the caches, and the
# memory beside the model is bounded.
CHUNK = 512
# What the engine's attention reads keys and values from.
_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class EngineRunner:
    """A decoder packed for the CPU, driven step by step with a `lmfast.KVCache` as its state.

    Prompts may be ragged, and steps of any length: `step` runs only real tokens, in pieces of up to
    512. Results do not depend on the number of threads, and not on what else is in the batch beyond
    the last bits. With narrower weights than "fp32", a row's products may be of bf16 where a call
    feeds it 32 tokens or more; in a batch of as many rows all may.

    Args:
        make_plan: returns the model's plan; called again by `repack`.
        weights: "fp32", "bf16", "int8" or "int4", of matrices that are not quantised already.
        group: numbers of a row of integers that share a scale; None: all.
        cache_dtype: of the caches that `new_state` makes; float32 for "fp32", else bfloat16.

    Raises:
        CannotPack: the model is of a kind that cannot be packed.
        ValueError: a `cache_dtype` that the engine does not read.
    """

    def __init__(
        self,
        make_plan: Callable[[], Plan],
        weights: str,
        group: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self._make_plan = make_plan
        self.weights, self.group = weights, group
        self._narrow = weights != "fp32"
        self.rounded_from = ROUNDED_FROM if self._narrow else 1
        self.device = torch.device("cpu")
        default = torch.float32 if weights == "fp32" else torch.bfloat16
        self.cache_dtype = default if cache_dtype is None else cache_dtype
        _check_cache_dtype("cache_dtype", self.cache_dtype)
        self.repack()

    def repack(self) -> None:
        """Pack the model's weights as they are now."""
        plan = self._make_plan()
        self._packed: Packed = pack(plan, self.weights, self.group)
        self.vocab_size = plan.vocab
        self.pad_idx = plan.pad_idx
        self.max_positions = plan.max_positions
        self._windows = plan.windows
        self._shape = (len(plan.layers), plan.kv_heads, plan.head_dim)
        self._tables = [rope.tables for rope in plan.ropes]
        self._rope: tuple[int, list[Tensor]] = 0, []  # in one piece, for threads
        self._watch = Watch(plan.parameters)
        self._lanes: WeakKeyDictionary[KVCache, dict[int, Lane]] = WeakKeyDictionary()

    def memory(self) -> int:
        """Bytes of the packed weights."""
        return self._packed.weights.nbytes

    def new_state(self, batch: int, capacity: int | None = None) -> KVCache:
        """Return an empty key/value cache for `batch` rows of up to `capacity` tokens."""
        layers, heads, dim = self._shape
        return KVCache(
            layers,
            batch,
            heads,
            dim,
            max_length=capacity,
            window=self._windows,
            dtype=self.cache_dtype,
        )

    def step(
        self,
        ids: Tensor,
        state: KVCache,
        lengths: Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> tuple[Tensor, KVCache]:
        """Feed the next tokens and return the logits of the one that follows.

        Args:
            ids: (B, T) int64, T >= 1.
            state: from `new_state` or the previous call; extended in place.
            lengths: (B,) int64, number of real tokens of each right-padded row, 0 to T; None = all
                T. The logits of a row with 0 mean nothing.
            all_positions: logits after every token rather than each row's last.

        Returns:
            Logits (B, V) float32, or (B, T, V), zero at padding, and the state.

        Raises:
            TypeError: ids or lengths of another type, a state that is no `KVCache`.
            ValueError: shapes, ids or lengths that do not fit, a cache of another model or full,
                more positions than the model has, parameters that changed since packing.
        """
        if lengths is None and not all_positions:
            found = self._next(ids, state)
            if found is not None:
                return found, state
        counts = self._check(ids, state, lengths)
        batch, steps = ids.shape
        if counts is not None and (short := short_rows(self._narrow, counts)) is not None:
            return step_apart(self, ids, state, counts, short, all_positions), state
        longest = steps if counts is None else max(counts, default=0)
        rounded = rounding(self._narrow, batch, longest, all_positions)
        shape = (batch, steps, self.vocab_size) if all_positions else (batch, self.vocab_size)
        done = 0
        logits: Tensor | None = None
        flat = ids if ids.is_contiguous() else ids.contiguous()
        while done < steps:
            most = _whole_step.room(state)
            size = max(1, CHUNK // max(batch, 1))
            size = min(size if most is None else min(size, most), steps - done)
            if size == steps:  # the usual case, without copies
                found, _ = self._run(flat, state, counts, all_positions, rounded)
                if all_positions and counts is not None:
                    logits = found.new_zeros(shape)
                    logits[_real(counts, steps)] = found
                    return logits, state
                return found.view(shape), state
            part = flat[:, done : done + size]
            now = None if counts is None else [min(max(n - done, 0), size) for n in counts]
            total = [steps] * batch if counts is None else counts
            ends = [done < n <= done + size for n in total]
            found, at = self._run(part.contiguous(), state, now, all_positions, rounded, ends)
            if logits is None:
                logits = found.new_zeros(shape)
            if all_positions:
                piece = logits[:, done : done + size]
                piece[at] = found.view(piece.shape) if isinstance(at, slice) else found
            elif any(ends):
                logits[torch.tensor(ends)] = found
            done += size
        assert logits is not None
        return logits, state

    def greedy(self, ids: Tensor, state: KVCache, steps: int, stops: Sequence[int] = ()) -> Tensor:
        """Feed the next token of every row, then up to `steps - 1` times the likeliest after it.

        One call of C++ for all of them: of two logits that are equal the first counts, as for
        `torch.argmax`.

        Args:
            ids: (B,) int64, the newest tokens, which the state does not have yet.
            state: from `new_state` or `step`; it then has `ids` and all new tokens but the last.
            steps: how many tokens to choose at most, at least 1.
            stops: once a row gets one of these ids, no further tokens are chosen.

        Returns:
            (n, B) int64, the tokens chosen, 1 <= n <= steps.

        Raises:
            TypeError, ValueError: as `step`.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        lane = self._lane(ids.view(-1, 1), state, steps)
        if lane is None or state.batch == 0:
            logits, _ = self.step(ids.view(-1, 1), state)
            return logits.argmax(-1)[None]
        chosen = torch.full((steps, lane.batch), -1)
        logits = torch.empty((lane.batch, self.vocab_size))
        stop_ids = torch.tensor(stops, dtype=torch.int64)
        self._call(engine_greedy, ids.view(-1, 1), state, lane, logits, stop_ids, chosen)
        done = steps if not len(stops) else int((chosen[:, 0] >= 0).sum())
        lane.finish(state, done)
        return chosen[:done]

    def _next(self, ids: Tensor, state: KVCache) -> Tensor | None:
        """The logits after one token per row, by the short way; None where there is none."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1:
            return None
        lane = self._lane(ids, state, 1)
        if lane is None:
            return None
        logits = torch.empty((lane.batch, self.vocab_size))
        self._call(engine_step, ids, state, lane, logits)
        lane.finish(state, 1)
        return logits

    def _lane(self, ids: Tensor, state: KVCache, steps: int) -> Lane | None:
        """The arrays for a state, ready for so many steps; None: it has to go the long way."""
        lanes = self._lanes.get(state) if isinstance(state, KVCache) else None
        lane = None if lanes is None else lanes.get(steps)
        if lane is None or lane.batch != state.batch:
            self._check(ids, state, None)
            lane = Lane(state.batch, steps, len(self._packed.windows))
            self._lanes.setdefault(state, {})[steps] = lane
        most = state._longest + steps
        if not self._watch.untouched():
            self._watch.check()
        if (
            ids.shape[0] != lane.batch
            or (self.max_positions is not None and most > self.max_positions)
            or not lane.begin(state)
        ):
            self._check(ids, state, None)
            return None
        return lane

    def _call(
        self,
        operator: Callable[..., None],
        ids: Tensor,
        state: KVCache,
        lane: Lane,
        *more: Tensor,
    ) -> None:
        try:
            operator(
                self._packed.weights,
                self._packed.program,
                ids if ids.is_contiguous() else ids.contiguous(),
                lane.positions,
                lane.wanted,
                lane.spans,
                lane.slots,
                lane.tables,
                lane.keys,
                lane.values,
                lane.scales,
                self._rotations(state._longest + lane.steps),
                rounding(self._narrow, lane.batch, 1, True),
                *more,
            )
        except RuntimeError:
            self._check(ids, state, None)  # which says what is wrong with the ids
            raise

    def _run(
        self,
        ids: Tensor,
        cache: KVCache,
        counts: list[int] | None,
        all_positions: bool,
        rounded: int,
        ends: list[bool] | None = None,
    ) -> tuple[Tensor, Tensor | slice]:
        """One call of the operator.

        Returns:
            Logits (N, V) of all real tokens, with which tokens (B, T) those are, or of the last one
            of each row, or of the rows that `ends` names.
        """
        steps = ids.shape[1]
        real: Tensor | slice = slice(None)
        step = _whole_step.begin(cache, steps, counts)
        new = step.new
        flat, positions = ids.view(-1), new.positions.reshape(-1)
        if new.kept is not None:
            flat, positions = flat[torch.from_numpy(new.kept)], positions[new.kept]
            if all_positions:
                real = _real(counts or [], steps)
        groups = [cache._group_of[layer] for layer in self._packed.layer_of_group]
        spans = np.stack([_whole_step.row_spans(step, g) for g in groups])
        if all_positions:
            wanted = np.arange(len(positions))
        else:
            wanted = (spans[0, :, 0] + spans[0, :, 1] - 1).clip(0)
            if ends is not None:
                wanted = wanted[np.array(ends)]
        logits = torch.empty((len(wanted), self.vocab_size))
        if len(positions) == 0:
            return logits.zero_(), real
        storage = _whole_step.storage_of(cache, step)
        scales = (
            []
            if cache.dtype != torch.int8
            else [t for s in storage for t in (s.key_scales, s.value_scales)]
        )
        engine_step(
            self._packed.weights,
            self._packed.program,
            flat,
            torch.from_numpy(np.ascontiguousarray(positions)),
            torch.from_numpy(wanted),
            torch.from_numpy(spans),
            [step.placements[g].slots for g in groups],
            [NO_TABLE if (t := step.placements[g].table) is None else t for g in groups],
            [s.keys for s in storage],
            [s.values for s in storage],
            scales,
            self._rotations(new.longest),
            rounded,
            logits,
        )
        _whole_step.finish(cache, step)
        return logits, real

    def _rotations(self, length: int) -> list[Tensor]:
        """Cosines and sines of every rotation, for at least `length` positions."""
        known, tables = self._rope
        if length > known:
            tables = [t for make in self._tables for t in make(length)]
            self._rope = min((len(t) for t in tables), default=length), tables
        return tables

    def _check(self, ids: Tensor, state: KVCache, lengths: Tensor | None) -> list[int] | None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids))}")
        if not isinstance(state, KVCache):
            raise TypeError(f"state must be a KVCache, got {type(state).__name__}")
        if ids.device.type != "cpu":
            raise ValueError(f"ids must be on the CPU, got {ids.device}")
        if ids.ndim != 2 or ids.shape[0] != state.batch or ids.shape[1] < 1:
            raise ValueError(
                f"ids must be (B, T) with T >= 1 and the {state.batch} rows of the state, got "
                f"{tuple(ids.shape)}"
            )
        shape = (state.num_layers, state.num_kv_heads, state.head_dim)
        _check_cache_dtype("state", state.dtype)
        if shape != self._shape or state.device.type != "cpu":
            raise ValueError(
                "state must be a cache of this model's (layers, kv heads, head size) "
                f"{self._shape} on the CPU, got {shape} of {state.dtype} on {state.device}"
            )
        for own, there in zip(self._windows, state._windows, strict=True):
            if there is not None and (own is None or own > there):
                raise ValueError(f"state keeps {there} tokens of a layer that sees {own or 'all'}")
        if ids.numel():
            lowest, highest = torch.aminmax(ids)
            if lowest < 0 or highest >= self.vocab_size:
                wrong = int(lowest if lowest < 0 else highest)
                raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}, got {wrong}")
        counts = None if lengths is None else _counts(lengths, *ids.shape)
        self._check_positions(state, ids.shape[1], counts)
        self._watch.check()
        return counts

    def _check_positions(self, state: KVCache, steps: int, counts: list[int] | None) -> None:
        if self.max_positions is None:
            return
        most = state.longest + steps
        if most > self.max_positions and counts is not None:
            most = int((state._lengths + np.array(counts)).max(initial=0))
        if most > self.max_positions:
            raise ValueError(
                f"the model has {self.max_positions} positions, a row would have {most} tokens"
            )


def _counts(lengths: Tensor, batch: int, steps: int) -> list[int] | None:
    """Lengths as integers; None when no row has padding."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point():
        raise TypeError(f"lengths must be a tensor of integers, got {lengths!r}")
    counts: list[int] = lengths.tolist()
    if lengths.shape != (batch,) or any(not 0 <= n <= steps for n in counts):
        raise ValueError(f"lengths must be {batch} numbers from 0 to T = {steps}, got {counts}")
    return None if all(n == steps for n in counts) else counts


def _real(counts: Sequence[int], steps: int) -> Tensor:
    """(B, T), true at real tokens."""
    return torch.arange(steps) < torch.tensor(counts)[:, None]


__all__ = ["CannotPack", "EngineRunner"]


def _check_cache_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _CACHE_DTYPES:
        raise ValueError(
            f"{name} must store float32, bfloat16, float16 or int8 to be read by the engine, got "
            f"{dtype}: make the cache with one of these, or run the model's modules on it"
        )
