"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmfast import ops
from lmfast.cache._blocks import BLOCK, BlockPool, BlockTable
from lmfast.cache._rows import CachedRows, Group, check_sizes, layer_windows
from lmfast.cache._step import Padding, Placement, Step, check_integer, make_step, new_tokens
from lmfast.cache._storage import Storage, on_device
from lmfast.cache._window import WindowedLayers, columns_for

_FIRST_CAPACITY = 64


class KVCache(CachedRows):
    """Preallocated keys and values of all layers, with a length per row.

        keys, values = cache.append(layer, k, v)                       # any attention, or
        q = cache.rope_append(layer, q, k, v, cos, sin)                # rotated on the way in
        out = cache.attend(layer, q)                                   # read where they lie

    Storage is (R, Hkv, capacity, D) per layer, row b of the cache in storage row b. With
    `max_length` it is made once (on a CPU, memory is used as tokens come); without, it doubles when
    full, so a token costs a constant number of copies. Keys are stored rotated and are never
    rotated again. Rows share what they have in common, in blocks of 64 tokens: `reorder`, `fork`
    and `share_prefix` copy nothing, and a row that appends into a shared block copies that block.
    Lengths live on the host: no step waits for a device.

    Layers with a window keep the last `window` tokens, and a few more so that they can be taken
    back; they are short, so `reorder`, `fork` and `share_prefix` copy them.

    Copies (`copy.deepcopy`, pickle) share nothing. Caches that share are not for several threads.

    Args:
        num_layers: number of attention layers that append, in order, per step.
        batch: number B of rows.
        num_kv_heads: Hkv.
        head_dim: D.
        max_length: tokens per row there may be; None = without limit.
        dtype, device: of the storage; float32, bfloat16, float16, float64, float8_e4m3fn, or int8
            with one float32 scale per key and value. The layers may compute in another.
        window: keys a query sees at most, itself included; of all layers, or one per layer. None =
            all.
        rows: storage rows to make at once, for forks and rows added later: without, they are added
            when needed.

    Raises:
        TypeError: a dtype that cannot be stored, or a number that is not an integer.
        ValueError: a size is not positive; from other methods, a shape, layer or length that does
            not fit, or no room left.

    Backends: those of `lmfast.ops.rope_append` and `lmfast.ops.cached_attention`.

    Source: sharing by blocks: Kwon et al., PagedAttention, 2023, arXiv:2309.06180.

    Example:
        >>> import torch
        >>> cache = KVCache(1, 2, 4, 8)
        >>> keys, values = cache.append(0, torch.ones(2, 4, 3, 8), torch.ones(2, 4, 3, 8))
        >>> keys.shape, cache.lengths.tolist()
        (torch.Size([2, 4, 3, 8]), [3, 3])
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        window: int | Sequence[int | None] | None = None,
        rows: int | None = None,
    ) -> None:
        rows = batch if rows is None else rows
        check_sizes(num_layers, batch, num_kv_heads, head_dim, max_length, dtype, rows)
        self._windows = layer_windows(window, num_layers)
        # Where all tokens fit into a window's storage they are kept, and shared.
        fits = max_length or math.inf
        windows = [None if w is None or fits <= columns_for(w) else w for w in self._windows]
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_length = max_length
        self.dtype = dtype
        self.device = torch.device(device)

        def storage(wanted: int | None, rows: int, columns: int) -> dict[int, Storage]:
            shape = (rows, num_kv_heads, columns, head_dim)
            layers = [i for i, w in enumerate(windows) if w == wanted]
            return {i: Storage.make(shape, dtype, self.device) for i in layers}

        columns = _FIRST_CAPACITY if max_length is None else max_length
        whole = storage(None, rows, columns)
        pool = BlockPool(whole, rows, columns, self.device, max_length is not None)
        groups: list[Group] = [BlockTable(pool, batch)]
        group_of = [0] * num_layers
        for w in sorted({w for w in windows if w is not None}):
            short = storage(w, batch, columns_for(w))
            groups.append(WindowedLayers(short, batch, w, self.device))
            for layer in short:
                group_of[layer] = len(groups) - 1
        super().__init__(groups, group_of, batch)

    def layer(
        self,
        index: int,
        counts: Sequence[int] | None = None,
        padding: Padding = "right",
    ) -> LayerCache:
        """Return the part of one layer, which is what an attention layer takes.

        Args:
            index: the layer.
            counts: (B,) number of real tokens per row in the next step; None = all T.
            padding: on which side of them the others are.
        """
        return LayerCache(self, index, counts, padding)

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        *,
        counts: Sequence[int] | None = None,
        padding: Padding = "right",
    ) -> tuple[Tensor, Tensor]:
        """Store the next T keys and values of one layer behind each row's end.

        Args:
            layer: index; layers append in order, and the last one moves the lengths on.
            k, v: (B, Hkv, T, D), keys already rotated, without gradients.
            counts: (B,) number of real tokens per row, the same for all layers; None = all T. The
                others are not stored.
            padding: "right": the real tokens are the first ones, "left": the last ones.

        Returns:
            Keys and values (B, Hkv, S, D), S = longest row + T: views of the storage; copies where
            rows share, and in k's dtype from 8 bits. What lies behind the end of a shorter row is
            to be masked. Of a layer with a window, the last tokens of each row: see `first`.
        """
        if not k.is_floating_point():
            raise TypeError(f"k must have a floating-point dtype, got {k.dtype}")
        self.rope_append(layer, k[:, :0], k, v, counts=counts, padding=padding)
        return self.contents(layer, k.dtype)

    def rope_append(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        interleaved: bool = True,
        positions: int | Tensor | None = None,
        counts: Sequence[int] | None = None,
        padding: Padding = "right",
    ) -> Tensor:
        """Rotate q in place and store k, rotated, and v: `append` by `lmfast.ops.rope_append`.

        Args:
            layer, k, v, counts, padding: as in `append`, the keys not yet rotated.
            q: (B, H, T, D); overwritten.
            cos, sin, interleaved: as in `lmfast.ops.rope`; no tables, no rotation.
            positions: for the rotation; by default tokens continue where their row ends.

        Returns:
            q.
        """
        if k.requires_grad or v.requires_grad or q.requires_grad:
            raise ValueError("a cache keeps no gradients: call the model under torch.no_grad()")
        step = self._begin(layer, k, counts, padding)
        group = self._groups[self._group_of[layer]]
        placement = self._placements[self._group_of[layer]]
        s = group.open(layer, placement)
        try:
            ops.rope_append(
                *(q, k, v, s.keys, s.values, placement.slots, cos, sin),
                positions=step.positions if positions is None else positions,
                interleaved=interleaved,
                tokens=step.tokens,
                key_scales=s.key_scales,
                value_scales=s.value_scales,
            )
        except Exception:
            if layer == 0:  # nothing has changed yet
                self._forget_step()
            raise
        group.close(layer, placement, step.new.ends)
        self._next_layer += 1
        if self._next_layer == self.num_layers:
            self._finish(step)
        return q

    def contents(self, layer: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer, as `append` does; 8-bit ones in `dtype`."""
        group, placement = self._look(layer)
        return group.gathered(layer, placement).read(placement.longest, dtype or torch.float32)

    def first(self, layer: int) -> Tensor:
        """Return the position of column 0 of `append`'s views, (B,) int64: 0 without a window."""
        _, placement = self._look(layer)
        if placement.first is None:
            return torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        return on_device(placement.first.copy(), self.device)

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        mask: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend from the newest T tokens of every row to all that the layer keeps, causally.

        Args:
            layer: index, after its `append` or `rope_append`, or between steps.
            q: (B, H, T, D), rotated.
            mask: in the place of causality, as in `lmfast.ops.attention`, with S the longest row
                and column j a row's token j; not for a layer with a window of the cache's own.
            window, softcap, sinks, alibi, scale: as in `lmfast.ops.cached_attention`; the window
                is the layer's own by default, and not longer.

        Returns:
            (B, H, T, D) in q's dtype. Where padding is, zeros or numbers that mean nothing.
        """
        group, placement = self._look(layer)
        if mask is not None:
            self.check_mask(layer)
            assert self._step is not None
            s = group.gathered(layer, placement)
            keys, values = (t.to(q.dtype) for t in s.read(placement.longest, q.dtype))
            return ops.attention(
                *(q, keys, values),
                causal=False,
                q_offset=placement.lengths - q.shape[2],
                mask=mask,
                # Padding is not stored, and what was truncated may hold anything.
                lengths=on_device(self._step.new.ends, self.device),
                window=window,
                softcap=softcap,
                sinks=sinks,
                alibi=alibi,
                scale=scale,
            )
        s = placement.storage[layer]
        own = self._windows[layer]
        if own is not None:
            if window is not None and window > own:
                raise ValueError(
                    f"layer {layer} keeps the last {own} tokens, which is less than the window "
                    f"{window}: make the cache with that window"
                )
            window = own if window is None else window
        table = placement.table
        if self.device.type != "cpu":
            # There the operator cannot look at the lengths, and may copy what it is given.
            s = s.first_columns(placement.longest)
            table = None if table is None else table[:, : -(-placement.longest // BLOCK)]
        return ops.cached_attention(
            *(q, s.keys, s.values, placement.lengths),
            table=table,
            key_scales=s.key_scales,
            value_scales=s.value_scales,
            window=window,
            softcap=softcap,
            sinks=sinks,
            alibi=alibi,
            scale=scale,
        )

    def check_mask(self, layer: int) -> None:
        """ValueError if `attend` takes no mask for a layer: a window does not keep all columns."""
        if self._windows[layer] is not None:
            raise ValueError(
                f"mask must be None or causal with this cache, whose layer {layer} keeps only the "
                f"last {self._windows[layer]} tokens: make the cache without window"
            )

    def _check_layer(self, layer: int) -> None:
        check_integer("layer", layer)
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in 0..{self.num_layers - 1}, got {layer}")

    def _begin(self, layer: int, k: Tensor, counts: Sequence[int] | None, padding: Padding) -> Step:
        """The step in progress, or a new one; ValueError if k does not come next."""
        step = self._step
        if step is not None and k.shape == step.shape and layer == self._next_layer > 0:
            return step
        self._check_layer(layer)
        if layer != self._next_layer:
            raise ValueError(
                f"layer {self._next_layer} is the next to append, got layer {layer}; truncate or "
                "reset forgets a step that was not finished"
            )
        wanted = (self.batch, self.num_kv_heads, self.head_dim)
        if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != wanted:
            shape = "({}, {}, T, {})".format(*wanted)
            raise ValueError(f"k must be {shape}, got {tuple(k.shape)}")
        if layer > 0 and step is not None:
            raise ValueError(
                f"k must have the {step.shape[2]} tokens of this step's first layer, "
                f"got {k.shape[2]}"
            )
        new = new_tokens(self._lengths, self._longest, k.shape[2], counts, padding)
        if self.max_length is not None and new.longest > self.max_length:
            raise ValueError(
                f"the cache is full: {new.longest} tokens, max_length is {self.max_length}; "
                "truncate it, or make it longer"
            )
        self._placements = [group.place(new) for group in self._groups]
        self._step = make_step(k.shape, new, self._longest, self.device)
        return self._step

    def _finish(self, step: Step) -> None:
        for group in self._groups:
            group.finish()
        self._lengths = step.new.ends
        self._longest = step.new.longest
        self._next_layer = 0

    def _look(self, layer: int) -> tuple[Group, Placement]:
        """Where a layer's tokens lie."""
        self._check_layer(layer)
        index = self._group_of[layer]
        done = self._next_layer == 0
        if self._step is None or (done and layer not in self._placements[index].storage):
            now = new_tokens(self._lengths, self._longest, 0, None, "right")
            self._placements = [group.place(now) for group in self._groups]
            self._step = make_step(torch.Size(()), now, self._longest, self.device)
        placement = self._placements[index]
        if 0 < self._next_layer <= layer or layer not in placement.storage:
            raise ValueError(
                f"layer {layer} has not appended the tokens of this step, or with a window and a "
                "step longer than it another layer has since"
            )
        return self._groups[index], placement


@dataclass(frozen=True)
class LayerCache:
    """One layer of a `KVCache`, as attention layers see it: its methods, with the layer given."""

    cache: KVCache
    index: int
    counts: Sequence[int] | None = None
    padding: Padding = "right"

    @property
    def offset(self) -> int | Tensor:
        """Position of the next token, see `KVCache.offset`."""
        return self.cache.offset

    @property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return self.cache.longest

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of this layer, see `KVCache.append`."""
        return self.cache.append(self.index, k, v, counts=self.counts, padding=self.padding)

    def rope_append(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, **options: Any
    ) -> Tensor:
        """Rotate q, and store k, rotated, and v, see `KVCache.rope_append`."""
        options = {"counts": self.counts, "padding": self.padding, **options}
        return self.cache.rope_append(self.index, q, k, v, cos, sin, **options)

    def contents(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return all keys and values of this layer, see `KVCache.contents`."""
        return self.cache.contents(self.index, dtype)

    def check_mask(self) -> None:
        """Refuse a mask where the layer has a window, see `KVCache.check_mask`."""
        self.cache.check_mask(self.index)

    def attend(self, q: Tensor, **options: Any) -> Tensor:
        """Attend to all keys of this layer, see `KVCache.attend`."""
        return self.cache.attend(self.index, q, **options)
