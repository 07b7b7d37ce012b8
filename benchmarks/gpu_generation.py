"""Tokens per second of whole generation on a GPU: by a CUDA graph per token, and by the loop."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from lmfast.generation import Generator
from lmfast.models import DecoderLanguageModel

# Name, (V, E, heads, blocks), key heads, tied; in bfloat16, one row of 32 tokens.
MODELS: tuple[tuple[str, tuple[int, int, int, int], int, bool], ...] = (
    ("8.6M", (32011, 128, 8, 2), 8, False),
    ("124M", (50257, 768, 12, 12), 12, True),
    ("1.2B", (128256, 2048, 32, 16), 8, True),
)
ROUNDS = 5


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_per_token(generator: Generator, ids: torch.Tensor, new: int) -> float:
    """Median over rounds; the time of the prompt and of a capture, by one token more, left out."""
    times = []
    for _ in range(ROUNDS):
        taken = []
        for count in (1, 1 + new):
            synchronize(ids.device.type)
            start = time.perf_counter()
            generator.generate(ids, max_new_tokens=count, eos_token_id=None)
            synchronize(ids.device.type)
            taken.append(time.perf_counter() - start)
        times.append((taken[1] - taken[0]) / new)
    return statistics.median(times)


def generation_rows(
    copy: float, *, models: Any = MODELS, new: int = 256, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Rows as of `benchmarks.gpu`: the bytes of a token are those of the weights.

    Args:
        copy: bytes per second of a copy.
        models: as `MODELS`.
        new: tokens per round.
        device: "cuda"; "cpu" for tests.
    """
    before = os.environ.get("LMFAST_CUDA_GRAPHS")
    for name, sizes, kv_heads, tied in models:
        model = DecoderLanguageModel(
            *sizes, 0, num_kv_heads=kv_heads, mlp="swiglu", final_norm=True, tie_weights=tied
        ).to(device, torch.bfloat16)
        ids = torch.randint(1, sizes[0], (1, 32), device=device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if not tied:
            weights -= model.embedding.weight.numel() * 2  # of which one row is read
        row: dict[str, Any] = {"case": f"generate {name}", "bytes": weights, "variants": {}}
        try:
            for variant, switch in (("graph", "1"), ("loop", "0")):
                os.environ["LMFAST_CUDA_GRAPHS"] = switch
                generator = Generator(model)
                generator.generate(ids, max_new_tokens=20, eos_token_id=None)
                each = seconds_per_token(generator, ids, new)
                row["variants"][variant] = {
                    "us": each * 1e6,
                    "tokens_per_s": 1 / each,
                    "gb_per_s": weights / each / 1e9,
                    "share_of_copy": weights / each / copy,
                }
        finally:
            if before is None:
                os.environ.pop("LMFAST_CUDA_GRAPHS", None)
            else:
                os.environ["LMFAST_CUDA_GRAPHS"] = before
        yield row
        del model
