"""Sample calls of ``decode_attention`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast.ops.rope_tables import rope_tables
from lmfast.testing import Sample


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Groups of heads, both pairings, chunks, tables, other storage, every option.

    int8 storage is not among them: a code on the edge between two falls to either side, see
    tests/test_decode_attention.py.
    """
    generator = torch.Generator(device).manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def sample(
        name: str,
        shape: tuple[int, int, int, int, int, int],
        lengths: list[int],
        *,
        rotary: int | None = None,
        rows: int | None = None,
        store_as: torch.dtype = dtype,
        **options: Any,
    ) -> Sample:
        batch, heads, kv_heads, steps, capacity, dim = shape
        new = normal(batch, kv_heads, steps, dim), normal(batch, kv_heads, steps, dim)
        stored = normal(2, rows or batch, kv_heads, capacity, dim).to(store_as).unbind(0)
        tables = () if rotary == 0 else rope_tables(200, rotary or dim, device=device)
        where = torch.tensor(lengths, dtype=torch.int64, device=device)
        args = (normal(batch, heads, steps, dim), *new, *stored, where, *tables)
        return Sample(name, args, options)

    def table(*entries: int) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32, device=device).view(2, -1)

    for interleaved in (True, False):
        kind = "interleaved" if interleaved else "half"
        yield sample(f"{kind}", (2, 4, 2, 1, 90, 32), [88, 1], interleaved=interleaved)
        yield sample(
            f"{kind}, paged, partly rotated",
            (2, 4, 4, 2, 150, 20),
            [149, 70],
            rotary=12,
            rows=5,
            table=table(0, 2, 4, 0, 1, 9),  # row 1 has no third block
            interleaved=interleaved,
        )
    every: dict[str, Any] = {
        "window": 40,
        "softcap": 4.0,
        "sinks": normal(4),
        "alibi": normal(4).float().abs(),
        "scale": 0.3,
    }
    yield sample("all options", (2, 4, 1, 1, 70, 64), [70, 12], **every)
    yield sample("seven heads of a group", (2, 14, 2, 1, 90, 32), [85, 3], sinks=normal(14))
    yield sample("not rotated, odd", (1, 3, 1, 3, 40, 7), [37], rotary=0)
    yield sample("many queries", (1, 4, 2, 9, 80, 16), [73])
    # float64 has one storage dtype.
    other = {torch.float32: torch.float16, torch.float64: torch.float64}.get(dtype, torch.float32)
    yield sample("other storage", (1, 2, 2, 1, 40, 24), [33], store_as=other)
    yield sample("no token", (1, 2, 2, 0, 4, 8), [3])
    yield sample("no row", (0, 2, 2, 1, 4, 8), [])
    base = sample("tokens before heads", (2, 4, 2, 2, 60, 16), [50, 9])
    q, k, v, *rest = base.args
    apart = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    yield Sample(base.name, (*apart, *rest))
