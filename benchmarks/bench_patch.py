"""`lmfast.patch` on transformers' models: a training step, a prefill and their own generate.

Peers are the same model as it comes, with eager attention, with SDPA and (training and prefill)
under torch.compile, in the precision of the row: bf16 is autocast in training, else bf16 weights.
In generation `engine` is `custom_generate=lmfast.generate` on the patched model. Random weights.

What patching can win in training. The products are the peers' too: 6 operations per weight and
token, 187, 307 and 380 GFLOP a step for the three models (61, 25 and 31 % of them in the output
layer). On two Zen 4 cores torch.mm does 190 GFLOP/s in fp32; in bf16 220 on one core, of a peak of
233, so 440 on two. A step then takes at least 0.98, 1.6 and 2.0 s, in bf16 0.43, 0.70 and 0.86 s,
and the limit of a row is the peer's time divided by that. Profiled, the 15M model's step in fp32 is
1.13 s against 1.28 s with SDPA, whose limit is 1.3: products take 90 % (the loss 0.61 s at 186
GFLOP/s, the layers 0.41 s at 180), attention 4 %, AdamW, SwiGLU, rotations with norms 1 % each. In
bf16 it is 0.58 s against 0.76 s (a limit of 1.8); of a profile's time the loss takes 47 %, the
layers' products 36 %, attention 6 %, AdamW 3 %, casts 2 %, so the rest of the limit lies in the
rate of the products themselves, two thirds to three quarters of torch.mm's best at these shapes. No
product of ours would help: on one core torch.mm does 190 to 220 GFLOP/s of bf16 factors at these
shapes, the kernel of ops.linear, which rounds fp32 factors, 165 to 195.
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
