"""Keys and values of the tokens seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class KVCache:
    """Preallocated keys and values of all layers, with a length per row.

        keys, values = cache.append(layer, k, v)   # everything up to and including k, v

    Storage is (B, Hkv, capacity, D) per layer. With `max_length` it is allocated once; without, it
    doubles when full, so appending a token costs a constant number of copies on average. Keys are
    stored rotated and are never rotated again.

    Args:
        num_layers: number of attention layers that append, in order, per step.
        batch: number B of rows.
        num_kv_heads: Hkv.
        head_dim: D.
        max_length: tokens per row there is room for; None = grow without limit.
        dtype, device: of the storage.

    Raises:
        ValueError: a size is not positive; from `append`, a shape or layer that does not fit, or no
            room left.

    Backends: PyTorch.

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
    ) -> None:
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if batch < 0:
            raise ValueError(f"batch must not be negative, got {batch}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 or None, got {max_length}")
        self.num_layers = num_layers
        self.max_length = max_length
        capacity = _FIRST_CAPACITY if max_length is None else max_length
        shape = (batch, num_kv_heads, capacity, head_dim)
        # Zeros, not empty: masked positions enter a product with weight 0, and 0 * NaN is NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        # Lengths live on the host, so that no step has to wait for the device.
        self._lengths = [0] * batch
        self._next_layer = 0

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self._lengths)

    @property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return max(self._lengths, default=0)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens per row, (B,) int64 on the cache's device."""
        return torch.tensor(self._lengths, dtype=torch.int64, device=self._keys[0].device)

    @property
    def offset(self) -> int | Tensor:
        """Position of the next token: an int if it is the same for all rows, else (B,) int64."""
        uniform = len(set(self._lengths)) <= 1
        return self.longest if uniform else self.lengths

    def layer(self, index: int) -> LayerCache:
        """Return the part of one layer, which is what an attention layer takes."""
        return LayerCache(self, index)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next T keys and values of one layer behind each row's end.

        Args:
            layer: index; layers append in order, and the last one moves the lengths on.
            k, v: (B, Hkv, T, D), keys already rotated, without gradients.

        Returns:
            Views (B, Hkv, S, D) of all keys and values, S = longest row + T. In a shorter row what
            lies behind its end is to be masked.
        """
        self._check(layer, k, v)
        steps = k.shape[2]
        start = self.longest
        self._reserve(layer, start + steps)
        keys, values = self._keys[layer], self._values[layer]
        offset = self.offset
        if isinstance(offset, int):
            keys[:, :, start : start + steps] = k
            values[:, :, start : start + steps] = v
        else:
            rows = torch.arange(self.batch, device=k.device)[:, None]
            columns = offset[:, None] + torch.arange(steps, device=k.device)  # (B, T)
            keys[rows, :, columns] = k.transpose(1, 2)
            values[rows, :, columns] = v.transpose(1, 2)
        self._next_layer += 1
        if self._next_layer == self.num_layers:
            self._next_layer = 0
            self._lengths = [length + steps for length in self._lengths]
        return keys[:, :, : start + steps], values[:, :, : start + steps]

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forget everything behind the given length of all rows, or of each row.

        Raises:
            ValueError: a length is negative or beyond the row's end, or there is not one per row.
        """
        if isinstance(lengths, int):
            wanted = [min(lengths, length) for length in self._lengths]
        else:
            values = lengths.tolist() if isinstance(lengths, Tensor) else lengths
            wanted = [int(n) for n in values]
            if len(wanted) != self.batch:
                raise ValueError(f"lengths must have {self.batch} entries, got {len(wanted)}")
            beyond = [i for i, n in enumerate(wanted) if n > self._lengths[i]]
            if beyond:
                row = beyond[0]
                raise ValueError(f"row {row} has {self._lengths[row]} tokens, not {wanted[row]}")
        if min(wanted, default=0) < 0 or (isinstance(lengths, int) and lengths < 0):
            raise ValueError(f"lengths must not be negative, got {lengths}")
        self._lengths = wanted
        self._next_layer = 0

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.truncate(0)

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Keep the given rows in the given order; a row may be dropped or occur several times.

        Raises:
            IndexError: a row does not exist.
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self._keys[0].device)
        chosen = index.tolist()
        if any(not 0 <= row < self.batch for row in chosen):
            raise IndexError(f"rows must be in 0..{self.batch - 1}, got {chosen}")
        self._keys = [keys.index_select(0, index) for keys in self._keys]
        self._values = [values.index_select(0, index) for values in self._values]
        self._lengths = [self._lengths[row] for row in chosen]

    def fork(self, copies: int) -> KVCache:
        """Return a new cache in which every row occurs `copies` times, next to each other."""
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        other = object.__new__(KVCache)
        other.num_layers = self.num_layers
        other.max_length = self.max_length
        other._keys = [keys.repeat_interleave(copies, dim=0) for keys in self._keys]
        other._values = [values.repeat_interleave(copies, dim=0) for values in self._values]
        other._lengths = [length for length in self._lengths for _ in range(copies)]
        other._next_layer = 0
        return other

    def _check(self, layer: int, k: Tensor, v: Tensor) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in 0..{self.num_layers - 1}, got {layer}")
        if layer != self._next_layer:
            raise ValueError(f"layer {self._next_layer} is the next to append, got layer {layer}")
        batch, heads, _, dim = self._keys[layer].shape
        if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, dim):
            raise ValueError(f"k must be ({batch}, {heads}, T, {dim}), got {tuple(k.shape)}")
        if v.shape != k.shape:
            raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
        if k.requires_grad or v.requires_grad:
            raise ValueError("a cache keeps no gradients: call the model under torch.no_grad()")

    def _reserve(self, layer: int, length: int) -> None:
        capacity = self._keys[layer].shape[2]
        if length <= capacity:
            return
        if self.max_length is not None:
            raise ValueError(f"the cache is full: {length} tokens, max_length is {capacity}")
        capacity = max(length, 2 * capacity)
        for store in (self._keys, self._values):
            old = store[layer]
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            store[layer] = new


@dataclass(frozen=True)
class LayerCache:
    """One layer of a `KVCache`, as attention layers see it."""

    cache: KVCache
    index: int

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
        return self.cache.append(self.index, k, v)
