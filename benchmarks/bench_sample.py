"""Drawing a token from 50,257 logits: one call, against sorting and transformers' processors.

Floor: the row is read once, 200 KB; `copy` is a plain copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmfast import ops

V = 50_257
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "typical 0.9": {"typical_p": 0.9},
}


def sorting(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Top-k and top-p as they are usually written."""
    ordered, ids = (logits / temperature).sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    shares = ordered.softmax(-1)
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(shares, 1))[:, 0]


def processors(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """What transformers' generate does with logits."""
    from transformers.generation import logits_process as lp

    made: list[Any] = [lp.TemperatureLogitsWarper(0.8)]
    for name, kind in (
        ("top_k", lp.TopKLogitsWarper),
        ("top_p", lp.TopPLogitsWarper),
        ("min_p", lp.MinPLogitsWarper),
        ("typical_p", lp.TypicalLogitsWarper),
    ):
        if name in options:
            made.append(kind(options[name]))

    def run(logits: Tensor) -> Tensor:
        for processor in made:
            logits = processor(None, logits)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    return run


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("name", FILTERS)
def bench_sample(compare: Callable[..., None], name: str, spread: float, batch: int) -> None:
    logits = torch.randn(batch, V) * spread
    options = FILTERS[name]
    theirs = processors(options)
    peers: dict[str, Callable[[], Any]] = {"transformers": lambda: theirs(logits)}
    if options.keys() <= {"top_k", "top_p"} and options:
        peers["sort"] = lambda: sorting(logits, 0.8, **options)
    shape = "flat" if spread < 1 else "peaked"
    compare(
        f"sample {batch}x{V} {shape} {name}",
        lambda: ops.sample(logits, temperature=0.8, **options),
        peers,
        moved=2 * logits.nbytes,
    )
