"""Arguments that tests and benchmarks call ``rope_append`` with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmfast.ops.rope_tables import rope_tables
from lmfast.testing import Sample


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Both pairings, groups of heads, odd sizes, chunks, padding, other storage dtypes."""
    generator = torch.Generator(device).manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def sample(
        name: str,
        shape: tuple[int, int, int, int, int],
        slots: list[int],
        *,
        storage: tuple[int, int],
        store_as: torch.dtype = dtype,
        rotary: int | None = None,
        tokens: list[int] | None = None,
        positions: int | list[int] = 0,
        **options: bool,
    ) -> Sample:
        batch, heads, kv_heads, steps, dim = shape
        k, v = normal(batch, kv_heads, steps, dim), normal(batch, kv_heads, steps, dim)
        keys = normal(storage[0], kv_heads, storage[1], dim).to(store_as)
        tables = () if rotary == 0 else rope_tables(40, rotary or dim, device=device)
        index = torch.tensor(slots, dtype=torch.int64, device=device)
        arguments = (normal(batch, heads, steps, dim), k, v, keys, keys.clone(), index)
        where = torch.tensor(positions, device=device) if isinstance(positions, list) else positions
        kept = None if tokens is None else torch.tensor(tokens, device=device)
        return Sample(
            name,
            (*arguments, *tables),
            {"positions": where, "tokens": kept, **options},
        )

    for interleaved in (True, False):
        name = "interleaved" if interleaved else "half"
        yield sample(
            f"{name} decoding",
            (2, 4, 2, 1, 64),
            [5, 9 + 3],
            storage=(2, 9),
            positions=[5, 3],
            interleaved=interleaved,
        )
        yield sample(
            f"{name} chunk, other rows",
            (2, 3, 1, 3, 18),
            [12, 13, 14, 0, 1, 2],
            storage=(3, 6),
            positions=4,
            interleaved=interleaved,
        )
        yield sample(
            f"{name} partial, padding",
            (2, 2, 2, 3, 24),
            [0, 7, 8],
            storage=(2, 7),
            rotary=10,
            tokens=[0, 3, 4],
            positions=[0, 36],
            interleaved=interleaved,
        )
    yield sample("not rotated", (1, 0, 2, 2, 6), [1, 2], storage=(1, 4), rotary=0)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        kind = dtype if dtype == torch.float64 else other  # float64 has one storage dtype
        yield sample(f"stored as {kind}", (1, 2, 2, 2, 34), [1, 2], storage=(1, 4), store_as=kind)
    yield sample("empty", (0, 2, 2, 3, 8), [], storage=(0, 4))
