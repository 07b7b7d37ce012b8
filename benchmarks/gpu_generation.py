"""Tokens per second of whole generation on a GPU: by a CUDA graph per token, and by the loop."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import lmfast
from lmfast.generation import Generator
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel


def decoder(vocab: int, width: int, heads: int, blocks: int, kv_heads: int, tied: bool) -> Any:
    return DecoderLanguageModel(
        *(vocab, width, heads, blocks, 0),
        num_kv_heads=kv_heads,
        mlp="swiglu",
        final_norm=True,
        tie_weights=tied,
    )


def gpt2() -> Any:
    """GPT-2 of transformers, with random weights, patched."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    lmfast.patch(model)
    return model


# In bfloat16, one row of 32 tokens.
MODELS: dict[str, Callable[[], Any]] = {
    "8.6M": lambda: decoder(32011, 128, 8, 2, 8, False),
    "124M": lambda: decoder(50257, 768, 12, 12, 12, True),
    "1.2B": lambda: decoder(128256, 2048, 32, 16, 8, True),
    "LSTM 2x1024": lambda: RecurrentLanguageModel(32011, 1024, 2, 0, cell="lstm"),
}
if importlib.util.find_spec("transformers"):
    MODELS["GPT-2 of transformers"] = gpt2
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
    copy: float,
    *,
    models: Mapping[str, Callable[[], Any]] = MODELS,
    new: int = 256,
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """Rows as of `benchmarks.gpu`: the bytes of a token are those of the weights.

    Args:
        copy: bytes per second of a copy.
        models: as `MODELS`.
        new: tokens per round.
        device: "cuda"; "cpu" for tests.
    """
    before = os.environ.get("LMFAST_CUDA_GRAPHS")
    for name, make in models.items():
        with torch.device(device):  # made where it runs: random numbers for a billion weights
            model = make().to(device, torch.bfloat16)
        of_transformers = hasattr(model, "get_input_embeddings")
        embedding = model.get_input_embeddings() if of_transformers else model.embedding
        ids = torch.randint(1, embedding.weight.shape[0], (1, 32), device=device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        matrices = [p for p in model.parameters() if p.shape == embedding.weight.shape]
        if len(matrices) > 1:  # not shared with the output: one row of it is read
            weights -= embedding.weight.numel() * 2
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
