"""`lmfast.patch` on transformers' models: a training step, a prefill and their own generate.

Peers are the same model as it comes, with eager attention, with SDPA and (training and prefill)
under torch.compile, in the precision of the row: bf16 is autocast in training, else bf16 weights.
In generation `engine` is `custom_generate=lmfast.generate` on the patched model. Random weights.

What patching can win in training: a step of the 15M model with V = 32,000 spends two thirds of its
products in the output layer, where the loss needs no logits; of the 160M model a quarter.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lmfast

transformers = pytest.importorskip("transformers")

LLAMAS = {  # width, feed-forward width, layers, heads, key/value heads
    "15M": (288, 768, 6, 6, 6),
    "160M": (768, 2048, 12, 12, 4),
}
# Sequences of a training step, of 256 tokens.
SEQUENCES = {"15M": 8, "160M": 2, "gpt2": 2}
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@pytest.fixture(scope="module", params=SEQUENCES)
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(size: str) -> Any:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if size == "gpt2":
        config = transformers.GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        return transformers.GPT2LMHeadModel(config)
    width, hidden, layers, heads, kv_heads = LLAMAS[size]
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
    )
    return transformers.LlamaForCausalLM(config)


def versions(model: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The patched model, and the same one with each of transformers' own attentions."""
    patched = copy.deepcopy(model).to(dtype)
    lmfast.patch(patched)
    theirs = {}
    for attention in ("eager", "sdpa"):
        theirs[attention] = copy.deepcopy(model).to(dtype)
        theirs[attention].set_attn_implementation(attention)
    return patched, theirs


def tokens(batch: int, steps: int) -> torch.Tensor:
    return torch.randint(5, 1000, (batch, steps), generator=torch.Generator().manual_seed(0))


@PRECISIONS
def bench_training(compare: Callable[..., None], model: Any, size: str, precision: str) -> None:
    ids = tokens(SEQUENCES[size], 256)

    def step(trained: Any, call: Any) -> Callable[[], None]:
        trained.train()
        optimizer = torch.optim.AdamW(trained.parameters(), 1e-4, fused=True)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()

        return run

    patched, theirs = versions(model, torch.float32)
    peers = {name: step(m, m) for name, m in theirs.items()}
    twin = copy.deepcopy(theirs["sdpa"])
    peers["compile"] = step(twin, torch.compile(twin))
    compare(f"patched training {size} {precision}", step(patched, patched), peers, rounds=5)


@PRECISIONS
def bench_prefill(compare: Callable[..., None], model: Any, size: str, precision: str) -> None:
    ids = tokens(1, 512)

    def pass_of(called: Any) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            called(input_ids=ids, use_cache=False, logits_to_keep=1)

        return run

    patched, theirs = versions(model, torch.bfloat16 if precision == "bf16" else torch.float32)
    patched.eval()
    peers = {name: pass_of(m.eval()) for name, m in theirs.items()}
    peers["compile"] = pass_of(torch.compile(copy.deepcopy(theirs["sdpa"])))
    compare(f"patched prefill {size} {precision}", pass_of(patched), peers, rounds=11)


@PRECISIONS
def bench_generation(compare: Callable[..., None], model: Any, size: str, precision: str) -> None:
    ids = tokens(1, 32)

    def generation(called: Any, **more: Any) -> Callable[[], None]:
        called.eval()

        def run() -> None:
            called.generate(
                ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0, **more
            )

        return run

    patched, theirs = versions(model, torch.bfloat16 if precision == "bf16" else torch.float32)
    peers = {name: generation(m) for name, m in theirs.items()}
    peers["engine"] = generation(patched, custom_generate=lmfast.generate)
    compare(f"patched generation {size} {precision}", generation(patched), peers, rounds=5)
