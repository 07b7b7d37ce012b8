"""Memory for the keys and values of one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmfast.ops._storage import FLOAT8

_ALIGNMENT = 64  # bytes: a cache line, and a vector of AVX-512


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that may be written to inside and outside of inference mode.

    On a CPU the operating system gives the memory when it is first written to: room for 32 k tokens
    costs nothing until they come. Zeros, because masked positions may enter a product with weight
    0, and 0 * NaN is NaN.
    """
    with torch.inference_mode(False):
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        memory = torch.from_numpy(np.zeros(size + _ALIGNMENT, dtype=np.uint8))
        first = -memory.data_ptr() % _ALIGNMENT
        return memory[first : first + size].view(dtype).view(shape)


@dataclass(slots=True)
class Storage:
    """Keys and values of one layer, (rows, Hkv, columns, D); int8 with a scale per vector."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    @classmethod
    def make(
        cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Storage:
        """Zeroed storage of a shape (rows, Hkv, columns, D)."""
        scaled = dtype == torch.int8
        return cls(
            zeros(shape, dtype, device),
            zeros(shape, dtype, device),
            zeros(shape[:3], torch.float32, device) if scaled else None,
            zeros(shape[:3], torch.float32, device) if scaled else None,
        )

    def tensors(self) -> Iterator[Tensor]:
        """The tensors there are, all with rows first and columns third."""
        return (
            t for t in (self.keys, self.values, self.key_scales, self.value_scales) if t is not None
        )

    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.nbytes for t in self.tensors())

    def resized(self, rows: int, columns: int) -> Storage:
        """The same contents with more room, or with less where that is not used."""
        _, heads, _, dim = self.keys.shape
        new = Storage.make((rows, heads, columns, dim), self.keys.dtype, self.keys.device)
        for old, t in zip(self.tensors(), new.tensors(), strict=True):
            r, c = min(rows, old.shape[0]), min(columns, old.shape[2])
            t[:r, :, :c] = old[:r, :, :c]
        return new

    def first_rows(self, count: int) -> Storage:
        """A view of the first rows."""
        if self.keys.shape[0] == count:
            return self
        parts = [t[:count] for t in self.tensors()]
        return Storage(*parts, *(None,) * (4 - len(parts)))

    def first_columns(self, count: int) -> Storage:
        """A view of the first columns."""
        parts = [t[:, :, :count] for t in self.tensors()]
        return Storage(*parts, *(None,) * (4 - len(parts)))

    def copy_rows(self, sources: Tensor, targets: Tensor, begin: int, end: int) -> None:
        """Copies columns begin..end of rows to other rows."""
        for t in self.tensors():
            t[targets, :, begin:end] = t[sources, :, begin:end]

    def take(self, other: Storage, rows: slice, source: int, target: int, count: int) -> None:
        """Copies columns of the same rows from another storage, or from further back in this."""
        for old, t in zip(other.tensors(), self.tensors(), strict=True):
            part = old[rows, :, source : source + count]
            overlaps = old is t and source < target + count
            t[rows, :, target : target + count] = part.clone() if overlaps else part

    def selected(self, rows: Tensor) -> Storage:
        """A copy of whole rows, in the given order."""
        with torch.inference_mode(False):
            parts = [t.index_select(0, rows) for t in self.tensors()]
        return Storage(*parts, *(None,) * (4 - len(parts)))

    def joined(self, other: Storage) -> Storage:
        """A copy with the rows of another storage of as many columns behind the own ones."""
        with torch.inference_mode(False):
            pairs = zip(self.tensors(), other.tensors(), strict=True)
            parts = [torch.cat(pair) for pair in pairs]
        return Storage(*parts, *(None,) * (4 - len(parts)))

    def gathered(self, rows: Tensor) -> Storage:
        """A copy (B, Hkv, S, D) in which column s of row b is what lies in row rows[b, s]."""
        columns = torch.arange(rows.shape[1], device=rows.device)
        parts = [t[rows, :, columns].transpose(1, 2) for t in self.tensors()]
        return Storage(*parts, *(None,) * (4 - len(parts)))

    def read(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Views (rows, Hkv, count, D) of keys and values; of 8-bit storage copies in ``dtype``."""
        keys, values = self.keys[:, :, :count], self.values[:, :, :count]
        if keys.dtype == FLOAT8:
            return keys.to(dtype), values.to(dtype)
        if self.key_scales is None or self.value_scales is None:
            return keys, values
        return (
            (keys * self.key_scales[:, :, :count, None]).to(dtype),
            (values * self.value_scales[:, :, :count, None]).to(dtype),
        )


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor, without waiting for the device."""
    t = torch.from_numpy(values)
    return t if device.type == "cpu" else t.to(device, non_blocking=True)
