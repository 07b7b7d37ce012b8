"""Sample calls of ``attention`` for tests and benchmarks: every option, odd sizes, odd strides."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmfast.testing import Sample


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of ``attention``; small enough for gradcheck where the name says so."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def qkv(b: int, h: int, hkv: int, t: int, s: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        return normal(b, h, t, d), normal(b, hkv, s, d), normal(b, hkv, s, d)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, device=device)

    # (B, H, Hkv, T, S, D)
    for shape in (
        (1, 1, 1, 1, 1, 1),
        (2, 2, 2, 4, 4, 6),
        (1, 2, 1, 5, 9, 16),
        (2, 4, 2, 33, 33, 40),
        (1, 3, 3, 130, 131, 64),
        (1, 1, 1, 67, 200, 96),
        (1, 2, 2, 65, 65, 128),
        (1, 1, 1, 20, 40, 256),
        (1, 2, 1, 1, 300, 64),
        (1, 4, 1, 3, 70, 24),
        (2, 2, 2, 0, 4, 8),
        (2, 2, 2, 3, 0, 8),
        (0, 2, 2, 3, 3, 8),
        (1, 1, 1, 7, 3, 8),
    ):
        yield Sample("x".join(map(str, shape)), qkv(*shape))
    small = (2, 4, 2, 5, 7, 8)
    yield Sample("not causal", qkv(*small), {"causal": False})
    yield Sample("not causal, long", qkv(1, 2, 2, 70, 150, 32), {"causal": False})
    yield Sample("scale", qkv(*small), {"scale": 0.7})
    yield Sample("negative scale", qkv(*small), {"scale": -0.3})
    yield Sample("offset", qkv(*small), {"q_offset": 1})
    yield Sample("offset tensor", qkv(*small), {"q_offset": torch.tensor(0, device=device)})
    yield Sample("offset per row", qkv(*small), {"q_offset": integers(-2, 3)})
    yield Sample("lengths", qkv(*small), {"lengths": integers(7, 3)})
    yield Sample("lengths 0", qkv(*small), {"lengths": integers(0, 6), "causal": False})
    yield Sample("window", qkv(1, 2, 2, 90, 100, 16), {"window": 5})
    yield Sample("window both sides", qkv(*small), {"window": 2, "causal": False})
    yield Sample("softcap", qkv(*small), {"softcap": 1.5})
    yield Sample("sinks", qkv(*small), {"sinks": normal(4)})
    yield Sample("alibi", qkv(*small), {"alibi": normal(4).float().abs()})
    seen = torch.rand((5, 7), generator=generator, device=device) < 0.6
    seen[2] = False
    yield Sample("bool mask", qkv(*small), {"mask": seen, "causal": False})
    yield Sample("added mask", qkv(*small), {"mask": normal(2, 1, 5, 7)})
    hidden = normal(2, 4, 5, 7).masked_fill(~seen, -torch.inf)
    yield Sample("added mask with -inf", qkv(*small), {"mask": hidden})
    padding = torch.zeros((2, 1, 1, 7), device=device, dtype=dtype)
    padding[1, ..., 4:] = torch.finfo(dtype).min
    yield Sample("padding mask", qkv(*small), {"mask": padding, "causal": False})
    yield Sample(
        "all options",
        qkv(2, 4, 2, 70, 80, 24),
        {
            "lengths": integers(80, 71),
            "window": 30,
            "softcap": 4.0,
            "sinks": normal(4),
            "alibi": normal(4).float().abs(),
            "mask": normal(1, 4, 1, 80),
        },
    )
    yield Sample(
        "decode, all options",
        qkv(2, 4, 2, 2, 150, 24),
        {
            "lengths": integers(149, 71),
            "window": 90,
            "softcap": 4.0,
            "sinks": normal(4),
            "alibi": normal(4).float().abs(),
            "mask": torch.rand((2, 1, 2, 150), generator=generator, device=device) < 0.8,
        },
    )
    q, k, v = normal(2, 33, 3 * 4 * 16).view(2, 33, 3, 4, 16).permute(2, 0, 3, 1, 4)
    yield Sample("packed projection", (q, k, v))
    cache_k, cache_v = normal(2, 2, 90, 16), normal(2, 2, 90, 16)
    cache_k[:, :, 60:], cache_v[:, :, 60:] = 1e4, -1e4
    yield Sample("cache", (normal(2, 4, 1, 16), cache_k, cache_v), {"lengths": integers(60, 17)})
    q, k, v = (normal(1, 2, 16, 20).transpose(2, 3) for _ in range(3))
    yield Sample("last dimension strided", (q, k, v))
