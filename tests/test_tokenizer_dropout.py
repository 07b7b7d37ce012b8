"""BPE-dropout: the same on both engines, reproducible, and left out as often as asked."""

from __future__ import annotations

import pytest
from tokenizer_support import ENGINES, ODD_TEXTS, corpus, gpt2, needs_engine

from lmfast.tokenizer import BPETokenizer
from lmfast.tokenizer.dropout import Random


@pytest.fixture(params=ENGINES)
def backend(request):
    return request.param


def test_random_numbers():
    """The first outputs of splitmix64 for the state 0, as its authors' program prints them."""
    draw = Random(0)
    for output in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F):
        assert draw.number() == (output >> 11) / 2**53


def test_seeds_and_limits(backend):
    tokenizer, text = gpt2(backend), corpus()[:2000]
    some = tokenizer.encode(text, dropout=0.3, seed=2)
    assert tokenizer.encode(text, dropout=0.3, seed=2) == some
    assert tokenizer.encode(text, dropout=0.3, seed=1) != some
    assert tokenizer.encode(text, dropout=0.3, seed=2 - 2**64) == some
    assert tokenizer.encode(text, dropout=0.3) != tokenizer.encode(text, dropout=0.3)
    assert tokenizer.decode(some) == text
    assert len(tokenizer.encode(text, dropout=1.0)) == len(text.encode())
    assert tokenizer.encode(text, dropout=1e-18, seed=3) == tokenizer.encode(text)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\]"):
            tokenizer.encode(text, dropout=wrong)
    with pytest.raises(TypeError, match=r"dropout must be a float, got '0\.1'"):
        tokenizer.encode(text, dropout="0.1")
    with pytest.raises(TypeError, match="seed must be an int or None, got '1'"):
        tokenizer.encode(text, dropout=0.1, seed="1")


@needs_engine
@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.95])
def test_engines_draw_alike(dropout):
    text = corpus()[:3000]
    ranks = {token: id for id, token in enumerate(gpt2().model.tokens) if token is not None}
    tokenizers = [
        gpt2(),
        BPETokenizer.train([text], 400, pattern=None),
        BPETokenizer.train([text], 400, pattern=r"\w+|\W"),
        BPETokenizer.from_tiktoken(ranks, pattern="cl100k"),
        BPETokenizer.train([text], 300, mode="char", special_tokens=["<unk>", "<x>"]),
    ]
    texts = [*(t[:200] for t in ODD_TEXTS), text, "a<|endoftext|>b <x> c", b"ab \xff\xfe cd", b"ab"]
    for fast in tokenizers:
        if "\\w" in (fast.pattern or ""):
            pytest.importorskip("regex")
        slow = BPETokenizer(fast.model, backend="reference")
        for seed, sample in enumerate(texts):
            if fast.pattern is None:
                sample = sample[:300]
            ids = fast.encode(sample, dropout=dropout, seed=seed)
            assert slow.encode(sample, dropout=dropout, seed=seed) == ids
            if fast.mode == "byte":
                raw = sample if isinstance(sample, bytes) else sample.encode("utf-8", "replace")
                assert fast.decode_bytes(ids) == raw


def test_how_often_merges_are_left_out(backend):
    """One merge is possible in each of 20,000 pieces: the share left out is the probability, to
    within five standard deviations of a binomial count."""
    tokenizer = BPETokenizer.train(["ab " * 3], 257, pattern="whitespace", backend=backend)
    assert tokenizer.merges == [(b"a", b"b")]
    count = 20_000
    for dropout in (0.1, 0.7):
        ids = tokenizer.encode("ab " * count, dropout=dropout, seed=5)
        left_out = ids.count(tokenizer.token_to_id(b"a"))
        slack = 5 * (count * dropout * (1 - dropout)) ** 0.5
        assert abs(left_out - count * dropout) < slack
