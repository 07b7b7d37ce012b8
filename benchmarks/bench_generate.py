"""Generation by the engine beside transformers and CTranslate2: tokens, prompts, long contexts.

    pytest benchmarks/bench_generate.py --benchmark-enable --benchmark-only [-k "gpt2 and B1"]

Random weights. Greedy, 32 prompt and 48 new tokens; `lmfast` is fp32, the other columns say what
they are, transformers and CTranslate2 in fp32 unless they do. Floor while decoding: reading the
packed weights once per token, but for embeddings beside the output layer. `read` is a plain read of
as many bytes in fp32, as often as there are new tokens, in the same minute: beside 1 row, its ratio
is the share of the bandwidth reached.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmfast
from lmfast.generation.engine import make_engine
from lmfast.generation.module_runner import ModuleRunner

transformers = pytest.importorskip("transformers")

PROMPT, NEW, ROUNDS = 32, 48, 3
# (width, feed-forward width, layers, heads, key/value heads, V)
LLAMAS = {
    "8.6M": (128, 512, 2, 8, 8, 32011),
    "15M": (288, 768, 6, 6, 6, 32000),
    "160M": (768, 2048, 12, 12, 4, 32000),
}
NARROW = ("bf16", "int8", "int4")
Compare = Callable[..., dict[str, Any]]


def make(name: str) -> Any:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    width, hidden, layers, heads, kv_heads, vocab = LLAMAS[name]
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[*LLAMAS, "gpt2"])
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, make(request.param)


def prompts(batch: int, steps: int = PROMPT) -> torch.Tensor:
    return torch.randint(5, 1000, (batch, steps), generator=torch.Generator().manual_seed(0))


def theirs(model: Any, ids: torch.Tensor, new: int = NEW) -> Callable[[], Any]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                ids,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )

    return run


def ctranslate2(model: Any, ids: torch.Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """The same by CTranslate2 where it is installed; GPT-2 alone, whose converter needs no more."""
    try:
        import ctranslate2 as peer
    except ImportError:
        return {}
    model.save_pretrained(folder / "hf")
    last = model.config.vocab_size - 1
    names = {"<|endoftext|>" if i == last else f"t{i}": i for i in range(last + 1)}
    (folder / "hf" / "vocab.json").write_text(json.dumps(names))
    (folder / "hf" / "merges.txt").write_text("#version: 0.2\n")
    transformers.GPT2Tokenizer(
        str(folder / "hf" / "vocab.json"), str(folder / "hf" / "merges.txt"), unk_token="t0"
    ).save_pretrained(folder / "hf")
    peer.converters.TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    shutil.rmtree(folder / "hf")
    tokens = [[f"t{i}" for i in row] for row in ids.tolist()]
    runs: dict[str, Callable[[], Any]] = {}
    for name, kind in (("ctranslate2", "float32"), ("ctranslate2_int8", "int8")):
        generator = peer.Generator(
            *(str(folder / "ct2"), "cpu"),
            compute_type=kind,
            intra_threads=torch.get_num_threads(),
        )
        runs[name] = lambda g=generator: g.generate_batch(
            tokens,
            max_length=NEW,
            min_length=NEW,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=len(tokens),
        )
    return runs


@pytest.mark.parametrize("batch", [1, 8], ids=["B1", "B8"])
def bench_generate(compare: Compare, named: tuple[str, Any], batch: int, tmp_path: Path) -> None:
    name, model = named
    ids = prompts(batch)
    kinds = ("fp32", *NARROW)
    generators = {kind: lmfast.Generator(model, weights=kind) for kind in kinds}
    runs: dict[str, Callable[[], Any]] = {
        kind: lambda g=g: g.generate(ids, max_new_tokens=NEW, eos_token_id=None)
        for kind, g in generators.items()
    }
    ours = runs.pop("fp32")
    runs["transformers"] = theirs(model, ids)
    runs["transformers_bf16"] = theirs(copy.deepcopy(model).bfloat16(), ids)
    if name == "gpt2":
        runs.update(ctranslate2(model, ids, tmp_path))
    if batch == 1:
        table = model.get_input_embeddings().weight
        looked_up = table is not model.get_output_embeddings().weight
        read = generators["fp32"].memory() - (table.nbytes if looked_up else 0)
        words = torch.ones(read // 8, dtype=torch.int64)
        runs["read"] = lambda: [words.sum() for _ in range(NEW)]
    row = compare(f"generate {name} B{batch}, {NEW} new tokens", ours, runs, rounds=ROUNDS)
    row["tokens_per_s"] = {
        key.removesuffix("_ms"): round(batch * NEW / value * 1e3)
        for key, value in row.items()
        if key.endswith("_ms") and key != "read_ms"
    }
    row["MB"] = {kind: round(g.memory() / 1e6, 1) for kind, g in generators.items()}


def bench_first_token_of_512(compare: Compare, named: tuple[str, Any]) -> None:
    """A prompt of 512 tokens and one new token."""
    name, model = named
    ids = prompts(1, 512)
    runs: dict[str, Callable[[], Any]] = {}
    for kind in ("fp32", *NARROW):
        generator = lmfast.Generator(model, weights=kind)
        runs[kind] = lambda g=generator: g.generate(ids, max_new_tokens=1, eos_token_id=None)
    ours = runs.pop("fp32")
    runs["transformers"] = theirs(model, ids, 1)
    runs["transformers_bf16"] = theirs(copy.deepcopy(model).bfloat16(), ids, 1)
    row = compare(f"first token of 512, {name}", ours, runs, rounds=ROUNDS)
    row["prompt_tokens_per_s"] = {
        key.removesuffix("_ms"): round(512 / value * 1e3)
        for key, value in row.items()
        if key.endswith("_ms")
    }


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def bench_recurrent_model(compare: Compare, cell: str) -> None:
    """The reference recurrent model, 8.3 M parameters for "elman", beside its own modules."""
    torch.manual_seed(0)
    model = lmfast.models.RecurrentLanguageModel(32011, 128, 2, 0, cell=cell).eval()
    ids = prompts(1)
    generators = {kind: lmfast.Generator(model, weights=kind) for kind in ("fp32", *NARROW)}
    generators["modules"] = lmfast.Generator(model)
    generators["modules"].runner = ModuleRunner(model)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda g=g: g.generate(ids, max_new_tokens=NEW, eos_token_id=None)
        for name, g in generators.items()
    }
    ours = runs.pop("fp32")
    row = compare(f"recurrent {cell} B1, {NEW} new tokens", ours, runs, rounds=15)
    row["tokens_per_s"] = {
        key.removesuffix("_ms"): round(NEW / value * 1e3)
        for key, value in row.items()
        if key.endswith("_ms")
    }


@pytest.mark.parametrize("top", [{"top_k": 50}, {"top_k": 0, "top_p": 0.9}], ids=str)
def bench_drawing(compare: Compare, top: dict[str, Any]) -> None:
    """What drawing adds to a token of GPT-2 in int8: `greedy` goes step by step, too."""
    generator = lmfast.Generator(make("gpt2"), weights="int8")
    ids = prompts(1)
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
    greedy = {**options, "suppress_tokens": [0]}  # not by the run
    compare(
        f"gpt2 int8 B1, {NEW} drawn tokens {next(reversed(top))}",
        lambda: generator.generate(ids, do_sample=True, **top, **options),
        {"greedy": lambda: generator.generate(ids, **greedy)},
        rounds=11,
    )


@pytest.mark.parametrize("context", [1024, 4096])
def bench_context(compare: Compare, context: int) -> None:
    """16 tokens behind a long text, of the 160M model."""
    model, new = make("160M"), 16
    ids = prompts(1, context)
    runs: dict[str, Callable[[], Any]] = {}
    for kind in ("fp32", "bf16", "int8"):
        runner = make_engine(model, kind)
        _, state = runner.step(ids, runner.new_state(1, context + new))

        def run(runner: Any = runner, state: Any = state) -> None:
            runner.greedy(ids[:, 0], state, new)
            state.truncate(context)

        runs[kind] = run
    with torch.inference_mode():
        cache = model(ids).past_key_values

    def transformers_steps() -> None:
        with torch.inference_mode():
            now = ids[:, :1]
            for _ in range(new):
                now = model(now, past_key_values=cache).logits[:, -1:].argmax(-1)
            cache.crop(-new)

    ours = runs.pop("fp32")
    runs["transformers"] = transformers_steps
    compare(f"160M, {new} tokens behind {context}", ours, runs, rounds=5)
