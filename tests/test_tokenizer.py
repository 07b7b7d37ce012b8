"""The tokenizer's own behaviour: the two engines against each other, limits, bad input, threads."""

from __future__ import annotations

import os
import pickle
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_support import ENGINES, ODD_TEXTS, corpus, gpt2, needs_engine

from lmfast.tokenizer import BPETokenizer, Model
from lmfast.tokenizer.backend import engine

SETTINGS = settings(max_examples=150, deadline=None)
SMALL_WORDS = st.lists(st.text("abc\u00e9漢", min_size=1, max_size=8), max_size=12)


@pytest.fixture(params=ENGINES)
def backend(request):
    return request.param


# The engine against the reference ---------------------------------------------------------------


@needs_engine
@SETTINGS
@given(
    SMALL_WORDS,
    st.integers(1, 40),
    st.sampled_from(["first", "ids", "lexicographic"]),
    st.sampled_from(["char", "byte"]),
    st.sampled_from([0, 2, 3]),
    st.sampled_from([None, 2, 3, 4]),
)
def test_training_equals_the_recounting_loop(words, size, tie_break, mode, least, longest):
    options = {
        "mode": mode,
        "tie_break": tie_break,
        "min_frequency": least,
        "max_token_length": longest,
        "pattern": "words" if mode == "char" else "whitespace",
    }
    size += 256 if mode == "byte" else 0
    fast = BPETokenizer.train([" ".join(words)], size, backend="cpu", **options)
    slow = BPETokenizer.train([" ".join(words)], size, backend="reference", **options)
    assert fast.merges == slow.merges
    assert fast == slow
    text = " ".join(reversed(words)) + " x"
    assert fast.encode(text) == slow.encode(text)


@needs_engine
@pytest.mark.parametrize("tie_break", ["first", "ids", "lexicographic"])
def test_training_with_many_ties(tie_break):
    draw = random.Random(3)
    for _ in range(40):
        letters = "ab" if draw.random() < 0.5 else "abcdefgh"
        words = ["".join(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(20)]
        fast, slow = (
            BPETokenizer.train(words, 60, mode="char", tie_break=tie_break, backend=b)
            for b in ("cpu", "reference")
        )
        assert fast.merges == slow.merges


@needs_engine
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "whitespace", None, r"\w+|\s"])
def test_engines_encode_alike(pattern):
    if pattern == r"\w+|\s":
        pytest.importorskip("regex", reason="any other pattern goes through the regex package")
    text = "".join(text[:200] for text in ODD_TEXTS)
    fast = BPETokenizer.train([text * 2], 600, pattern=pattern, backend="cpu")
    slow = BPETokenizer(fast.model, backend="reference")
    # Cut short: the reference takes a second for a piece of a thousand bytes.
    for text in [*(text[:200] for text in ODD_TEXTS), b"\xff\xfe abc \xe3\x80", b""]:
        ids = fast.encode(text)
        assert ids == slow.encode(text)
        assert fast.encode_numpy(text).tolist() == ids
        assert fast.count(text) == slow.count(text) == len(ids)
        raw = text if isinstance(text, bytes) else text.encode()
        assert fast.decode_bytes(ids) == slow.decode_bytes(ids) == raw
        for errors in ("replace", "ignore"):
            cut = ids[: len(ids) // 2 + 1]
            assert fast.decode(cut, errors=errors) == slow.decode(cut, errors=errors)


@needs_engine
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "words"])
def test_levels_encode_alike(pattern):
    text = corpus()[:30_000]
    mode = "char" if pattern == "words" else "byte"
    tokenizer = BPETokenizer.train([text, *ODD_TEXTS], 900, mode=mode, pattern=pattern)
    specials = tokenizer._all_specials.matcher
    for level in engine("cpu").levels():
        encoder = tokenizer._make_encoder(level=level)
        for sample in [*ODD_TEXTS, text, text]:
            assert encoder.encode(sample, specials) == tokenizer.encode(sample), level


# Worst cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_000_000,
        "\n" * 300_000 + "x",
        "漢字仮名" * 50_000,
        "".join(random.Random(0).choices("ACGT", k=600_000)),
        "0" * 200_000,
        "^" * 200_000 + "'" * 100_000,
    ],
    ids=["letters", "spaces", "newlines", "no-spaces", "dna", "digits", "symbols"],
)
@needs_engine
def test_long_pieces(text):
    ids = gpt2().encode_numpy(text)
    assert gpt2().decode(ids) == text
    assert np.array_equal(gpt2().encode_numpy(text), ids)
    # The same merges as in short pieces: a prefix that ends with a token encodes to these tokens.
    ends = np.cumsum(gpt2().model.byte_lengths[ids])
    head = gpt2().decode_bytes(ids[:10])
    assert gpt2()._merge_piece(head) == ids[:10].tolist() or "\n" in text
    assert ends[-1] == len(text.encode())


@needs_engine
def test_long_pieces_equal_the_reference():
    draw = random.Random(1)
    for size in (47, 48, 49, 50, 300):
        for letters in ("a", "ab", "the and ", "abcdefghijklmnopqrstuvwxyz"):
            piece = "".join(draw.choices(letters, k=size)).encode()
            slow = BPETokenizer(gpt2().model, backend="reference")
            assert gpt2()._merge_piece(piece) == slow._merge_piece(piece)


@needs_engine
@pytest.mark.parametrize("seed", range(4))
def test_windows_of_long_pieces_equal_the_reference(seed):
    """Vocabularies with tokens about as long as a window, and texts where their ends shift."""
    draw = random.Random(seed)
    runs = ["a" * draw.randint(1, 200) for _ in range(30)]
    blocks = [("ab" * draw.randint(1, 60))[draw.randint(0, 1) :] for _ in range(30)]
    mixed = ["".join(draw.choices("abc", k=draw.randint(1, 90))) for _ in range(30)]
    trained = BPETokenizer.train(runs + blocks + mixed, 256 + 60 * (1 + seed), pattern=None)
    ranks = {token: id for id, token in enumerate(trained.model.tokens)}
    for fast in (trained, BPETokenizer.from_tiktoken(ranks, pattern=None)):
        slow = BPETokenizer(fast.model, backend="reference")
        for size in (63, 64, 65, 128, 300, 700):
            for text in (
                "a" * size,
                "ab" * (size // 2) + "a",
                "".join(draw.choices("ab", k=size)),
                "".join(draw.choices([*runs, *blocks, *mixed], k=9))[:size],
            ):
                assert fast.encode(text) == slow.encode(text)
                assert fast.count(text) == len(fast.encode(text))


def test_merges_that_are_not_in_rank_order(backend):
    """A rank may lie below those of its own parts: then positions, not ranks, are worked off."""
    tokens = tuple([bytes([b]) for b in range(256)] + [b"ab", b"aba", b"bb", b"ababa"])
    merges = np.array([[256, 97, 257, 0], [257, 98, 258, 1], [97, 98, 256, 5]])
    with pytest.raises(ValueError, match="do not make the new token"):
        Model(mode="byte", pattern=None, tokens=tokens, merges=merges)
    merges = np.array([[256, 97, 257, 0], [98, 98, 258, 1], [97, 98, 256, 5]])
    tokenizer = BPETokenizer(
        Model(mode="byte", pattern=None, tokens=tokens[:259], merges=merges), backend=backend
    )
    slow = BPETokenizer(tokenizer.model, backend="reference")
    draw = random.Random(2)
    for size in (3, 20, 60, 300):
        text = "".join(draw.choices("ab", k=size))
        assert tokenizer.encode(text) == slow.encode(text)


def test_the_cache_does_not_change_ids():
    draw = random.Random(7)
    words = ["".join(draw.choices("абвгдежзabc12", k=draw.randint(1, 45))) for _ in range(60_000)]
    # Short ones that make the table grow, and long ones that are more than it keeps.
    digits = str.maketrans("0123456789", "etaoinshrd")
    words += [f"{(i * 2654435761) % 10**8}".translate(digits) for i in range(150_000)]
    words += [f"{(i * 2654435761) ** 3:031d}"[:31].translate(digits) for i in range(250_000)]
    text = " ".join(words)
    cold = gpt2().encode_numpy(text)
    for _ in range(2):
        assert np.array_equal(gpt2().encode_numpy(text), cold)
    assert gpt2().decode(cold) == text


@needs_engine
def test_training_on_one_long_word():
    text = "".join(random.Random(0).choices("ACGT", k=300_000))
    tokenizer = BPETokenizer.train([text], 500, pattern=None)
    assert tokenizer.vocab_size == 500
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_counts_beyond_32_bits(backend):
    words = {"ab": 2**40, "cd": 2**40 + 1, "ef": 3}
    tokenizer = BPETokenizer.train(words, 259, pattern=None, backend=backend)
    assert tokenizer.merges == [(b"c", b"d"), (b"a", b"b"), (b"e", b"f")]


@needs_engine
@pytest.mark.parametrize("tie_break", ["first", "ids", "lexicographic"])
def test_weights_of_16_bits_and_more_at_many_positions(tie_break):
    """Many positions are looked at together, where a weight may be among them that does not fit."""
    draw = random.Random(3)
    for weights in ([1, 2, 9, 2**16 - 2], [1] * 90 + [2**16 - 1], [2**16 - 1, 2**16, 2**40, 5]):
        words = {}
        for _ in range(500):
            words["".join(draw.choices("aabc", k=draw.randint(2, 12)))] = draw.choice(weights)
        fast, slow = (
            BPETokenizer.train(words, 330, pattern=None, tie_break=tie_break, backend=backend)
            for backend in ("cpu", "reference")
        )
        assert fast.merges == slow.merges


# Calls ------------------------------------------------------------------------------------------


def test_batches(backend):
    tokenizer = gpt2(backend)
    texts = [*ODD_TEXTS[:-2], *ODD_TEXTS[:5]]
    for threads in (1, 2, 5):
        rows = tokenizer.encode_batch(texts, threads=threads)
        assert [row.tolist() for row in rows] == [tokenizer.encode(text) for text in texts]
    raw = [text.encode() for text in texts]
    for more in ([], [b"ab\xff c\xe3\x80"]):
        expected = [tokenizer.encode(text) for text in [*texts, *more]]
        assert [row.tolist() for row in tokenizer.encode_batch([*raw, *more])] == expected
    ids, offsets = tokenizer.encode_batch(texts, flat=True)
    assert offsets[-1] == len(ids)
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode_batch(rows) == texts


@needs_engine
def test_threads_and_fork():
    texts = corpus().splitlines()[:600]
    expected = [gpt2().encode(text) for text in texts]
    wrong = []

    def work():
        wrong.extend(t for t, e in zip(texts, expected) if gpt2().encode(t) != e)
        rows = gpt2().encode_batch(texts, threads=2)
        wrong.extend(r for r, e in zip(rows, expected) if r.tolist() != e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            same = [r.tolist() for r in gpt2().encode_batch(texts, threads=2)] == expected
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert not wrong


def test_offsets(backend):
    tokenizer = gpt2(backend)
    for text in [*(text[:200] for text in ODD_TEXTS), "a \ud83d\ude00 b\ud83d"]:
        ids, spans = tokenizer.offsets(text)
        assert ids == tokenizer.encode(text)
        at = 0
        for start, end in spans:
            assert start <= at <= end
            assert start < end
            at = end
        assert at == len(text)
    assert tokenizer.offsets("café 漢!")[1] == [
        (0, 1),
        (1, 3),
        (3, 4),
        (4, 6),
        (5, 6),
        (5, 6),
        (6, 7),
    ]


def test_offsets_of_words(backend):
    tokenizer = BPETokenizer.train(["low lower"] * 3, 20, mode="char", backend=backend)
    ids, spans = tokenizer.offsets("  lower xlow<eos> low")
    words = ["  lower xlow<eos> low"[start:end] for start, end in spans]
    assert "".join(words) == "lowerxlow<eos>low"
    assert len(ids) == len(spans)


def test_truncate(backend):
    tokenizer = gpt2(backend)
    for text in ("It isn't the 漢字 end.", "  a  b\n", "", "😀😀"):
        total = tokenizer.count(text)
        for most in range(total + 2):
            kept = tokenizer.truncate(text, most)
            assert text.startswith(kept)
            assert tokenizer.count(kept) <= most
        assert tokenizer.truncate(text, total) == text
    assert tokenizer.truncate("one two three", 2) == "one two"


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", None])
def test_appender(pattern):
    text = "It's a test, isn't it?\n\n  Yes <|end|> 123 456\n" * 3 + "漢字 é"
    tokenizer = BPETokenizer.train([text], 300, pattern=pattern, special_tokens=["<|end|>"])
    draw = random.Random(0)
    for _ in range(20):
        appender, at = tokenizer.appender(), 0
        while at < len(text):
            step = draw.randint(1, 9)
            appender.append(text[at : at + step])
            at += step
            assert appender.ids() == tokenizer.encode(text[:at])
        assert len(appender) == tokenizer.count(text)


def test_stream_decoder(backend):
    for text in ("naïve 漢字 😀 end", "a"):
        stream = gpt2(backend).stream_decoder()
        parts = [stream.push(id) for id in gpt2(backend).encode(text)]
        assert "".join(parts) + stream.finish() == text
        assert all("\ufffd" not in part for part in parts)
    words = BPETokenizer.train(["low lower"], 20, mode="char", backend=backend)
    stream = words.stream_decoder()
    assert "".join(stream.push(id) for id in words.encode("low lower")) == "low lower"


def test_pickle_and_files(tmp_path, backend):
    for tokenizer in (
        BPETokenizer.train(["a b é"], 260, special_tokens=["<x>"], backend=backend),
        BPETokenizer.train(["low lower"], 20, mode="char", backend=backend),
    ):
        path = tmp_path / "t.json"
        tokenizer.save(path)
        for copy in (pickle.loads(pickle.dumps(tokenizer)), BPETokenizer.load(path)):
            assert copy == tokenizer
            assert copy.encode("low é <x>") == tokenizer.encode("low é <x>")
        with pytest.raises(AttributeError):
            tokenizer.anything = 1
