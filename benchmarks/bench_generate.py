"""Generation beside transformers, llama.cpp and CTranslate2: tokens, prompts, contexts.

    pytest benchmarks/bench_generate.py --benchmark-enable --benchmark-only -k "gpt2 and B1"

Random weights. Greedy, 32 prompt and 48 new tokens; `lmfast` is fp32, the other columns say what
they are, transformers, llama.cpp and CTranslate2 in fp32 unless they do. What is in fp32 must give
the same first tokens. Every round runs all columns once, one after the other. A model of one size
is a minute or two: `-k` takes 8.6M, 15M, 160M or gpt2 and, of `bench_generate`, B1 or B8.

`bench_steps` has steps alone, behind 32, 1,024 and 4,096 tokens, beside the peers, and
`bench_share_of_read` beside their floor: reading the packed weights, but for embeddings beside the
output layer, and the keys and values. `read_*` is a plain read of as many bytes as often, in the
same second, and `share_of_read` its time over the steps'.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import generation_peers
import pytest
import torch

import lmfast
from lmfast.generation.engine import make_engine
from lmfast.generation.module_runner import ModuleRunner

transformers = pytest.importorskip("transformers")

PROMPT, NEW, STEPS = 32, 48, 16
# (width, feed-forward width, layers, heads, key/value heads, V)
LLAMAS = {
    "8.6M": (128, 512, 2, 8, 8, 32011),
    "15M": (288, 768, 6, 6, 6, 32000),
    "160M": (768, 2048, 12, 12, 4, 32000),
}
NARROW = ("bf16", "int8", "int4")
# Rounds of a second or more, or of less.
ROUNDS = {"8.6M": 11, "15M": 11, "160M": 3, "gpt2": 3}
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


def check(name: str, peer: Any, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """The first tokens must be the same: else the peer runs another model."""
    new = expected.shape[1]
    found = peer.generate(ids, new)
    assert found == expected.tolist(), f"{name}: {found} in the place of {expected.tolist()}"


@pytest.mark.parametrize("batch", [1, 8], ids=["B1", "B8"])
def bench_generate(compare: Compare, named: tuple[str, Any], batch: int) -> None:
    name, model = named
    ids = prompts(batch)
    generators = {kind: lmfast.Generator(model, weights=kind) for kind in ("fp32", *NARROW)}
    runs: dict[str, Callable[[], Any]] = {
        kind: lambda g=g: g.generate(ids, max_new_tokens=NEW, eos_token_id=None)
        for kind, g in generators.items()
    }
    ours = runs.pop("fp32")
    runs["transformers"] = theirs(model, ids)
    runs["transformers_bf16"] = theirs(copy.deepcopy(model).bfloat16(), ids)
    for peer_name, peer in generation_peers.peers(model, 1024).items():
        if peer_name in generation_peers.EXACT:
            check(peer_name, peer, ids, ours()[:, PROMPT : PROMPT + 4])
        runs[peer_name] = lambda p=peer: p.generate(ids, NEW)
    row = compare(f"generate {name} B{batch}, {NEW} new tokens", ours, runs, rounds=ROUNDS[name])
    row["tokens_per_s"] = per_second(row, batch * NEW)
    row["MB"] = {kind: round(g.memory() / 1e6, 1) for kind, g in generators.items()}


def per_second(row: dict[str, Any], tokens: int) -> dict[str, int]:
    """Tokens a second of every column."""
    return {
        key.removesuffix("_ms"): round(tokens / value * 1e3)
        for key, value in row.items()
        if key.endswith("_ms")
    }


def bench_first_token_of_512(compare: Compare, named: tuple[str, Any]) -> None:
    """A prompt of 512 tokens and one new token: the time to the first token."""
    name, model = named
    ids = prompts(1, 512)
    runs: dict[str, Callable[[], Any]] = {}
    for kind in ("fp32", *NARROW):
        generator = lmfast.Generator(model, weights=kind)
        runs[kind] = lambda g=generator: g.generate(ids, max_new_tokens=1, eos_token_id=None)
    ours = runs.pop("fp32")
    runs["transformers"] = theirs(model, ids, 1)
    runs["transformers_bf16"] = theirs(copy.deepcopy(model).bfloat16(), ids, 1)
    for peer_name, peer in generation_peers.peers(model, 1024).items():
        runs[peer_name] = lambda p=peer: p.generate(ids, 1)
    row = compare(f"first token of 512, {name}", ours, runs, rounds=ROUNDS[name])
    row["prompt_tokens_per_s"] = per_second(row, 512)


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
    row["tokens_per_s"] = per_second(row, NEW)


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


@pytest.mark.parametrize(
    ("name", "context"),
    [("gpt2", 32), ("gpt2", 1000), ("160M", 32), ("160M", 1024), ("160M", 4096)],
)
def bench_steps(compare: Compare, name: str, context: int) -> None:
    """Tokens behind a text, beside the peers that can go back to its end."""
    model = make(name)
    ids = prompts(1, context)
    runs: dict[str, Callable[[], Any]] = {
        kind: ours_behind(model, kind, ids)[0] for kind in ("fp32", *NARROW)
    }
    with torch.inference_mode():
        cache = model(ids).past_key_values

    def transformers_steps() -> None:
        with torch.inference_mode():
            now = ids[:, :1]
            for _ in range(STEPS):
                now = model(now, past_key_values=cache).logits[:, -1:].argmax(-1)
            cache.crop(-STEPS)

    ours = runs.pop("fp32")
    runs["transformers"] = transformers_steps
    for peer_name, peer in generation_peers.peers(model, context + 2 * STEPS).items():
        if not hasattr(peer, "extend"):  # CTranslate2 begins every text anew
            continue
        peer.prefill(ids)

        def peer_steps(peer: Any = peer) -> None:
            peer.extend([int(ids[0, 0])], context, STEPS + 1)
            peer.truncate(context)

        runs[peer_name] = peer_steps
    row = compare(f"{name}, {STEPS} tokens behind {context}", ours, runs, rounds=7)
    row["tokens_per_s"] = per_second(row, STEPS)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], ids=["1 thread", "2 threads"], indirect=True)
@pytest.mark.parametrize(
    ("name", "context"), [("gpt2", 32), ("160M", 32), ("160M", 1024), ("160M", 4096)]
)
def bench_share_of_read(compare: Compare, name: str, context: int, threads: int) -> None:
    """Tokens behind a text, and a plain read of what they read."""
    model = make(name)
    ids = prompts(1, context)
    runs: dict[str, Callable[[], Any]] = {}
    for kind in ("fp32", *NARROW):
        run, size = ours_behind(model, kind, ids)
        words = torch.ones(size // 8, dtype=torch.int64)
        runs[kind] = run
        runs[f"read_{kind}"] = lambda words=words: [words.sum() for _ in range(STEPS)]
    ours = runs.pop("fp32")
    title = f"{name}, read and {STEPS} tokens behind {context}, threads: {threads}"
    row = compare(title, ours, runs, rounds=15)
    if row:
        row["share_of_read"] = {
            kind: round(row[f"read_{kind}_ms"] / row[f"{column}_ms"], 3)
            for kind, column in [("fp32", "lmfast"), *zip(NARROW, NARROW, strict=True)]
        }


def ours_behind(model: Any, weights: str, ids: torch.Tensor) -> tuple[Callable[[], Any], int]:
    """STEPS tokens behind a text, and what one of them has to read: weights without embeddings that
    are looked up, keys and values."""
    runner = make_engine(model, weights)
    context = ids.shape[1]
    _, state = runner.step(ids, runner.new_state(1, context + STEPS))

    def run() -> None:
        runner.greedy(ids[:, 0], state, STEPS)
        state.truncate(context)

    table = model.get_input_embeddings().weight
    looked_up = table is not model.get_output_embeddings().weight
    width = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 1}[weights]
    read = runner.memory() - (table.numel() * width if looked_up else 0)
    tokens = 2 * state.num_layers * state.num_kv_heads * state.head_dim
    return run, read + context * tokens * state.dtype.itemsize
