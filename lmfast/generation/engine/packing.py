"""Weights in the order the engine reads them: blocks of columns, in one piece of memory.

A matrix (N, K) of ``y = x W^T`` is cut into panels of 16 rows of W, and those into blocks of four;
of a block the depth lies in order, so that a product reads one stream of memory from front to back
and needs no sum across lanes. The last block has the panels that are left.

    float32   [block][k][panel][16]
    bfloat16  [block][k / 2][panel][16][2]     pairs of the depth of one column
    int8      [block][k / 4][panel][16][4]     codes + 128
    int4      [block][k / 8][panel][16][4]     codes + 8 of k = 8 i + j; above, of 8 i + 4 + j
    scales    [block][group][panel][16]        of groups, float16

csrc/cpu/kernels/engine.h has the same table.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmfast.ops._rounding import INT4_GROUP, Bits, Quantised, quantise_groups, quantise_rows

PANEL, BLOCK = 16, 4
WEIGHTS = ("fp32", "bf16", "int8", "int4")
GROUPS = (32, 64, 128)
DEPTH_STEP = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}
_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20


def as_panels(codes: Tensor, kind: str, fill: int = 0) -> Tensor:
    """(N, K) as panels, padded with `fill` to whole panels and steps of the depth; as bytes."""
    step = DEPTH_STEP[kind]
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % step, 0, -n % PANEL), value=fill)
    parts = padded.view(padded.shape[0] // PANEL, PANEL, -1, step).transpose(1, 2)
    if kind == "int4":
        low, high = parts[..., :4], parts[..., 4:]
        parts = low | (high << 4)
    return in_blocks(parts).view(torch.uint8)


def in_blocks(panels: Tensor) -> Tensor:
    """(panels, steps, ...) as blocks [step][panel] one behind the other, flat."""
    whole = len(panels) // BLOCK * BLOCK
    first = panels[:whole].unflatten(0, (whole // BLOCK, BLOCK)).transpose(1, 2)
    return torch.cat([first.flatten(), panels[whole:].transpose(0, 1).flatten()])


@dataclass(frozen=True)
class Storage:
    """How a matrix is kept: one of `WEIGHTS`, and of integers the group that shares a scale."""

    kind: str
    group: int | None = None

    @property
    def bits(self) -> Bits:
        """Of integers."""
        return 4 if self.kind == "int4" else 8


def storage_of(weight: Tensor | Quantised, wanted: Storage) -> Storage:
    """As wanted, or as it is quantised already."""
    if isinstance(weight, Quantised):
        return Storage(f"int{weight.bits}", weight.group)
    return wanted


def check_group(weights: str, group: int | None) -> int | None:
    """The group of such weights; ValueError for one they cannot have."""
    if group is None:
        return INT4_GROUP if weights == "int4" else None
    if weights not in ("int8", "int4"):
        raise ValueError(f'group goes with weights "int8" and "int4", got {weights!r} and {group}')
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    return group


@dataclass(frozen=True)
class Matrix:
    """Where a matrix lies: the fields of the kernel's EngineMatrix, in order."""

    weights: int
    scales: int
    bias: int
    panels: int
    depth: int
    type: int
    group: int


class Packer:
    """Collects what goes into a model's memory, and writes it into one piece.

    Nothing is computed before `finish`, which makes the pieces one after the other: beside the
    packed weights only the largest matrix is there twice.
    """

    def __init__(self) -> None:
        self._size = 0
        self._pieces: list[tuple[int, int, Callable[[], Tensor]]] = []

    def add(self, nbytes: int, make: Callable[[], Tensor]) -> int:
        """Reserve aligned room for what `make` will return; its offset."""
        offset = self._size
        self._pieces.append((offset, nbytes, make))
        self._size = -(-(offset + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return offset

    def floats(self, t: Tensor, padded: int | None = None) -> int:
        """Add a vector or matrix of float32, filled up with zeros; its offset."""
        count = t.numel() if padded is None else padded

        def make() -> Tensor:
            flat = t.detach().float().flatten()
            return torch.nn.functional.pad(flat, (0, count - flat.numel()))

        return self.add(4 * count, make)

    def matrix(
        self,
        rows: int,
        depth: int,
        weight: Callable[[], Tensor | Quantised],
        bias: Tensor | None,
        storage: Storage,
    ) -> Matrix:
        """Add a matrix (rows, depth).

        Args:
            weight: returns it, (rows, depth), in floating point or already quantised.
            bias: (rows,) or None.
            storage: how it is kept; of what is quantised already, how that is.
        """
        kind, group = storage.kind, storage.group or 0
        panels, step = -(-rows // PANEL), DEPTH_STEP[kind]
        unit = group or step
        padded = -(-depth // unit) * unit
        made: list[Quantised] = []  # between the two pieces of one matrix

        def quantised() -> Quantised:
            w = weight()
            if not isinstance(w, Quantised):
                w = quantise_groups(w, group, storage.bits) if group else quantise_rows(w)
            return w

        def main() -> Tensor:
            if kind == "fp32" or kind == "bf16":
                w = weight()
                assert isinstance(w, Tensor)
                dtype = torch.float32 if kind == "fp32" else torch.bfloat16
                return as_panels(w.detach().to(dtype), kind)
            q = quantised()
            made.append(q)
            offset = 128 if kind == "int8" else 8
            codes = (q.codes.to(torch.int16) + offset).to(torch.uint8)
            codes = torch.nn.functional.pad(codes, (0, padded - codes.shape[1]), value=offset)
            return as_panels(codes, kind, offset)

        def scales() -> Tensor:
            s = made.pop().scales
            if not group:
                return torch.nn.functional.pad(s.float(), (0, panels * PANEL - rows))
            s = torch.nn.functional.pad(s.half(), (0, 0, 0, panels * PANEL - rows))
            return in_blocks(s.view(panels, PANEL, -1).transpose(1, 2))

        at = self.add(panels * (padded // step) * 64, main)
        scaled = -1
        if kind in ("int8", "int4"):
            count = panels * PANEL
            scaled = self.add(2 * count * padded // group if group else 4 * count, scales)
        offset = -1 if bias is None else self.floats(bias, panels * PANEL)
        return Matrix(at, scaled, offset, panels, padded, WEIGHTS.index(kind), group)

    def finish(self) -> Tensor:
        """All pieces, as bytes."""
        memory = huge_pages(self._size)
        for offset, nbytes, make in self._pieces:
            piece = make().contiguous().view(-1).view(torch.uint8)
            if piece.numel() != nbytes:
                raise AssertionError(f"a piece of {piece.numel()} bytes, {nbytes} were reserved")
            memory[offset : offset + nbytes] = piece
        return memory


def huge_pages(nbytes: int) -> Tensor:
    """Zeroed bytes, where the system has them in pages of 2 MB: fewer misses of the page tables."""
    size = max(nbytes, 1)
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < _HUGE_PAGE:
        memory = torch.zeros(size + _ALIGNMENT, dtype=torch.uint8)
        first = -memory.data_ptr() % _ALIGNMENT
        return memory[first : first + nbytes]
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    area = mmap.mmap(-1, (size // _HUGE_PAGE + 2) * _HUGE_PAGE, flags=private)
    area.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    first = -memory.data_ptr() % _HUGE_PAGE
    return memory[first : first + nbytes]
