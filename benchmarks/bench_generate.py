"""Generation by the engine against transformers' generate: 32 prompt and 48 new tokens, greedy.

Floor: while decoding, reading the packed weights once per token: the column GB_per_s is to be
compared with what a plain read of as many bytes reaches on the machine. Random weights.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import lmfast
from lmfast.generation.engine import EngineRunner, make_engine

transformers = pytest.importorskip("transformers")

PROMPT, NEW = 32, 48
# (width, feed-forward width, layers, heads, key/value heads, V)
LLAMAS = {
    "8.6M": (128, 512, 2, 8, 8, 32011),
    "15M": (288, 768, 6, 6, 6, 32000),
    "160M": (768, 2048, 12, 12, 4, 32000),
}
MODELS = [*LLAMAS, "gpt2"]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if request.param == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    width, hidden, layers, heads, kv_heads, vocab = LLAMAS[request.param]
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )
    return transformers.LlamaForCausalLM(config).eval()


def prompts(batch: int, steps: int = PROMPT) -> torch.Tensor:
    return torch.randint(5, 1000, (batch, steps), generator=torch.Generator().manual_seed(0))


def note(benchmark: Any, tokens: int, runner: EngineRunner | None = None) -> None:
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["tokens_per_s"] = round(tokens / seconds)
    if runner is not None:
        benchmark.extra_info["MB"] = round(runner.memory() / 1e6, 1)
        benchmark.extra_info["GB_per_s"] = round(runner.memory() * NEW / seconds / 1e9, 1)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_generate(benchmark: Any, model: Any, weights: str, batch: int) -> None:
    generator = lmfast.Generator(model, weights=weights)
    ids = prompts(batch)
    benchmark.group = f"generate {type(model).__name__} {model.num_parameters()} B{batch}"
    benchmark.pedantic(
        lambda: generator.generate(ids, max_new_tokens=NEW, eos_token_id=None),
        rounds=5,
        warmup_rounds=1,
    )
    runner = generator.runner
    note(benchmark, NEW * batch, runner if isinstance(runner, EngineRunner) else None)


@pytest.mark.parametrize("batch", [1, 8])
def test_transformers(benchmark: Any, model: Any, batch: int) -> None:
    ids = prompts(batch)
    benchmark.group = f"generate {type(model).__name__} {model.num_parameters()} B{batch}"

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                ids,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    note(benchmark, NEW * batch)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_prefill_of_512(benchmark: Any, model: Any, weights: str) -> None:
    runner = make_engine(model, weights)
    ids = prompts(1, 512)
    benchmark.group = f"prefill {type(model).__name__} {model.num_parameters()}"
    benchmark.pedantic(lambda: runner.step(ids, runner.new_state(1, 512)), rounds=5)
    note(benchmark, 512)
