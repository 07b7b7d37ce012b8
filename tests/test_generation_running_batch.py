"""Sequences that come and go: each gets what it would get alone, and rows cost no copies."""

import numpy as np
import pytest
import torch

from lmfast.generation import Generator, KVCache
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel

V = 37


def make(kind):
    torch.manual_seed(0)
    if kind == "llama":
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
            bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval().double()
    if kind in ("decoder", "window"):
        window = {"windows": [8, None]} if kind == "window" else {}
        model = DecoderLanguageModel(V, 16, 4, 2, 0, num_kv_heads=2, final_norm=True, **window)
    else:
        model = RecurrentLanguageModel(V, 16, 2, 0, cell=kind)
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    return model.double().eval()


@pytest.mark.parametrize("kind", ["decoder", "window", "lstm", "llama"])
@pytest.mark.parametrize("shared", [False, True])
def test_sequences_get_what_they_would_get_alone(kind, shared):
    generator = Generator(make(kind))
    beginning = torch.randint(1, V, (70,)) if shared else torch.zeros(0, dtype=torch.int64)
    prefix = generator.prefill(beginning[None]) if shared else None
    prompts = [torch.cat((beginning, torch.randint(1, V, (n,)))) for n in (5, 1, 20, 3, 9, 2)]
    limits = [80, 10, 30, 25, 1, 40]
    numbers = [
        {},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.5},
        {"repetition_penalty": 1.5},
        {"do_sample": True, "top_k": 5, "eos_token_id": 3, "min_new_tokens": 4},
        {},
        {"choices": [[1, 2, 3], [4, 5], [7]]},
    ]

    def options(i):
        seeded = torch.Generator().manual_seed(i)
        return {"max_new_tokens": limits[i], "generator": seeded, **numbers[i]}

    batch = generator.batch(prefix)
    arrivals = {0: [0, 1], 3: [2], 4: [3, 4], 20: [5]}
    keys, seen, step = {}, {}, 0
    while batch.running or step <= 20:
        for i in arrivals.get(step, ()):
            keys[batch.add(prompts[i], **options(i))] = i
        for key, new_id in batch.step().items():
            seen.setdefault(keys[key], []).append(new_id)
        step += 1
    for key, i in keys.items():
        alone = generator.generate(prompts[i][None], **options(i))[0, len(prompts[i]) :].tolist()
        assert seen[i] == alone
        assert batch.new_ids(key) == alone


def test_sequences_are_removed_while_others_run():
    generator = Generator(make("decoder"))
    prompts = [[3, 4], [5], [6, 7, 8]]
    batch = generator.batch()
    a, b, c = (batch.add(p, max_new_tokens=70) for p in prompts)
    for _ in range(66):  # past a block of the cache
        batch.step()
    batch.remove(b)
    assert batch.running == [a, c]
    while batch.running:
        batch.step()
    for key, prompt in ((a, prompts[0]), (c, prompts[2])):
        alone = generator.generate(torch.tensor([prompt]), max_new_tokens=70)[0, len(prompt) :]
        assert batch.new_ids(key) == alone.tolist()
    with pytest.raises(KeyError):
        batch.new_ids(b)
    assert batch.step() == {}
    with pytest.raises(ValueError, match="cannot have num_beams"):
        batch.add([1], max_new_tokens=2, num_beams=2)
    for bad, shape in (([[1]], r"\(1, 1\)"), ([], r"\(0,\)")):
        with pytest.raises(ValueError, match=rf"ids must be \(T,\) with T >= 1, got {shape}"):
            batch.add(bad, max_new_tokens=2)
    batch.remove(c)
    assert batch.add([9], max_new_tokens=2) not in (a, b, c)  # which others may still hold


@pytest.mark.parametrize("kind", ["decoder", "llama"])
def test_errors_and_interrupts_lose_nothing(kind, monkeypatch):
    generator = Generator(make(kind))
    options = {"max_new_tokens": 12, "do_sample": True}
    alone = {
        seed: generator.generate(
            torch.tensor([[3, 4 + seed]]), generator=torch.Generator().manual_seed(seed), **options
        )[0, 2:].tolist()
        for seed in range(3)
    }
    batch = generator.batch()
    keys = {
        seed: batch.add([3, 4 + seed], generator=torch.Generator().manual_seed(seed), **options)
        for seed in range(2)
    }
    batch.step()
    hopeless = batch.add([5], max_new_tokens=3, suppress_tokens=range(generator.runner.vocab_size))
    keys[2] = batch.add([3, 6], generator=torch.Generator().manual_seed(2), **options)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"sequence {hopeless}: .* no token is left"):
            batch.step()
    batch.remove(hopeless)
    batch.step()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generator.runner, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
    assert [len(batch.new_ids(keys[seed])) for seed in range(3)] == [3, 3, 2]
    while batch.running:
        batch.step()
    assert {seed: batch.new_ids(key) for seed, key in keys.items()} == alone


@pytest.mark.parametrize("window", [None, 6])
def test_rows_of_siblings_and_forks_are_taken_over(window):
    """A cache against lists of keys, through random steps, forks, joins and drops."""
    random = np.random.default_rng(0)
    cache = KVCache(1, 2, 1, 2, window=window)
    texts = [[], []]
    number = 0

    def append(cache, texts, counts):
        nonlocal number
        width = max(counts)
        k = torch.zeros(len(counts), 1, width, 2)
        for row, count in enumerate(counts):
            for t in range(count):
                number += 1
                k[row, 0, t] = number
                texts[row].append(float(number))
        cache.append(0, k, -k, counts=counts)

    for _ in range(60):
        action = random.integers(4)
        if action == 0 and texts:
            append(cache, texts, random.integers(1, 40, len(texts)).tolist())
        elif action == 1:
            other, new = cache.sibling(2), [[], []]
            append(other, new, random.integers(1, 90, 2).tolist())
            cache.append_rows(other)
            texts += new
            assert other.batch == 0
        elif action == 2 and texts:
            other, new = cache.fork(), [list(t) for t in texts]
            rows = random.integers(0, len(texts), 1).tolist()
            other.reorder(rows)
            new = [new[row] for row in rows]
            append(other, new, [5])
            cache.append_rows(other)
            texts += new
        elif len(texts) > 4:
            rows = random.permutation(len(texts))[:3].tolist()
            cache.reorder(rows)
            texts = [texts[row] for row in rows]
        assert cache.lengths.tolist() == [len(t) for t in texts]
        if texts and max(map(len, texts)):
            keys, values = cache.contents(0)
            first = cache.first(0).tolist()
            for row, text in enumerate(texts):
                seen = text[first[row] :]
                assert keys[row, 0, : len(seen), 0].tolist() == seen
                assert values[row, 0, : len(seen), 1].tolist() == [-x for x in seen]
                assert window is None or len(seen) >= min(len(text), window)
    with pytest.raises(ValueError, match="other must be made from this cache by sibling or fork"):
        cache.append_rows(cache)
    if window is None:
        with pytest.raises(ValueError, match="by sibling or fork"):
            cache.append_rows(KVCache(1, 1, 1, 2))


def test_a_sequence_can_be_removed_after_a_step_that_failed():
    model = DecoderLanguageModel(50, 16, 2, 1, 0)
    generator = Generator(model)
    batch = generator.batch()
    first, second = (batch.add([i], max_new_tokens=8) for i in (3, 7))
    batch.step()
    with torch.no_grad():
        model.embedding.weight.mul_(1.0)
    with pytest.raises(ValueError, match="repack"):
        batch.step()
    batch.remove(first)
    assert batch.running == [second]
    generator.runner.repack()
    while batch.running:
        batch.step()
    assert len(batch.new_ids(second)) == 8
    with pytest.raises(KeyError):
        batch.remove(first)


@pytest.mark.parametrize("kind", ["decoder", "lstm", "llama"])
def test_a_step_interrupted_within_the_model_goes_on_where_it_was(kind):
    model = make(kind)
    generator = Generator(model)
    prompt = [5, 9, 2]
    alone = generator.generate(torch.tensor([prompt]), max_new_tokens=8)[0, 3:].tolist()
    batch = generator.batch()
    key = batch.add(prompt, max_new_tokens=8)
    batch.step()
    inner = [
        m for m in model.modules() if type(m).__name__ in ("DecoderBlock", "LlamaDecoderLayer")
    ]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    original = generator.runner.step
    if inner:
        inner[1].forward, forward = interrupt, inner[1].forward
    else:
        generator.runner.step = interrupt
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    if inner:
        inner[1].forward = forward
    else:
        generator.runner.step = original
    while batch.running:
        batch.step()
    assert batch.new_ids(key) == alone
