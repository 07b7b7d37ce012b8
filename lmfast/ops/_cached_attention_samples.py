"""Sample calls of ``cached_attention`` for tests and benchmarks: every option, odd sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmfast.testing import Sample


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of ``cached_attention`` with queries of ``dtype``."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def inputs(
        b: int, h: int, hkv: int, t: int, c: int, d: int, *lengths: int
    ) -> tuple[Tensor, ...]:
        q, keys, values = normal(b, h, t, d), normal(b, hkv, c, d), normal(b, hkv, c, d)
        for i, n in enumerate(lengths):  # what lies behind must not count
            keys[i, :, n:], values[i, :, n:] = 1e4, -1e4
        return q, keys, values, integers(*lengths)

    def stored_as(other: torch.dtype, q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> tuple:
        return q, k.to(other), v.to(other), n

    def quantised(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> tuple[tuple, dict[str, Tensor]]:
        scales = [t.float().abs().amax(-1).clamp_min(1e-8) / 127 for t in (k, v)]
        k, v = (
            (t.float() / s[..., None]).round().to(torch.int8)
            for t, s in zip((k, v), scales, strict=True)
        )
        return (q, k, v, n), {"key_scales": scales[0], "value_scales": scales[1]}

    # (B, H, Hkv, T, C, D, *lengths)
    for shape in (
        (1, 1, 1, 1, 1, 1, 1),
        (1, 2, 2, 1, 300, 64, 290),
        (2, 4, 1, 1, 200, 64, 130, 64),
        (2, 4, 2, 3, 90, 40, 90, 2),
        (1, 8, 1, 1, 700, 128, 699),
        (1, 2, 2, 16, 150, 64, 131),
        (2, 4, 2, 16, 130, 33, 17, 128),
        (1, 3, 1, 5, 80, 256, 77),
        (2, 2, 1, 40, 100, 24, 99, 41),
        (2, 2, 2, 1, 4, 8, 0, 4),
        (2, 2, 2, 0, 4, 8, 1, 4),
        (0, 2, 2, 3, 3, 8),
    ):
        yield Sample("x".join(map(str, shape)), inputs(*shape))
    small = (2, 4, 2, 2, 150, 24, 149, 71)
    many = (2, 4, 2, 20, 150, 24, 149, 71)
    others = [t for t in (torch.float32, torch.bfloat16, torch.float16) if t != dtype]
    for other in others[:2]:
        name = str(other).removeprefix("torch.")
        yield Sample(f"{name} storage", stored_as(other, *inputs(*small)))
        yield Sample(f"{name} storage, many queries", stored_as(other, *inputs(*many)))
    for name, shape in (("int8", small), ("int8, many queries", many)):
        args, scales = quantised(*inputs(*shape))
        yield Sample(name, args, scales)
    options = {
        "window": 90,
        "softcap": 4.0,
        "sinks": normal(4),
        "alibi": normal(4).float().abs(),
        "scale": 0.3,
    }
    table = integers(1, 0, 2, 1, 2, 9).view(2, 3).int()  # row 1 has no third block
    for name, shape in (("few", small), ("many", many)):
        q, _, _, lengths = inputs(*shape)
        keys, values = normal(3, 2, 150, 24), normal(3, 2, 150, 24)
        yield Sample(f"table, {name} queries", (q, keys, values, lengths), {"table": table})
        yield Sample(
            f"all options, {name} queries",
            (q, keys, values, lengths),
            {"table": table, **options},
        )
        args, scales = quantised(q, keys, values, lengths)
        extra = {**scales, **options, "table": table}
        yield Sample(f"int8, all options, {name} queries", args, extra)
    q = normal(2, 3, 4, 16).transpose(1, 2)
    keys, values = normal(2, 70, 2, 2, 16).permute(3, 0, 2, 1, 4)
    yield Sample("tokens before heads", (q, keys, values, integers(70, 9)))
    q, keys, values = normal(2, 2, 1, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 8)
    yield Sample("one length", (q, keys, values, integers(5)[0]))
