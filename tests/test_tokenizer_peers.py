"""Identical ids and merges: tiktoken, Hugging Face tokenizers, and the engine's own levels."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_support import ENGINES, ODD_TEXTS, corpus, every_category, gpt2, needs_engine

from lmfast.tokenizer import BPETokenizer
from lmfast.tokenizer.backend import engine
from lmfast.tokenizer.patterns import PUBLISHED, SCANNERS, splitter
from lmfast.tokenizer.unicode_classes import class_table

# All planes, with what the patterns treat specially drawn more often.
ANY_TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t'/.!sStdmlvreLLa1239é漢ǅʰ½\u0301\u00a0\u3000\u017f\u0085😀"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=200,
)
EXAMPLES = settings(max_examples=300, deadline=None)


@pytest.fixture(params=ENGINES)
def backend(request):
    return request.param


def all_planes(count: int, seed: int = 0) -> str:
    """Every category: characters spread over all of Unicode, each between other kinds."""
    draw = random.Random(seed)
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    return "".join(draw.choice(" a1\n!'") + chr(c) for c in draw.sample(points, count))


# The scanners --------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("pattern", SCANNERS[1:])
def test_scanners_equal_the_expressions(pattern):
    module = engine("cpu")
    texts = [*ODD_TEXTS, all_planes(3000), every_category(), "".join(ODD_TEXTS) * 3]
    # As a str of one, two and four bytes a character: long runs of ASCII and none.
    texts += ["x y " * 90 + odd + "z " * 200 + odd * 3 for odd in "é漢😀"]
    for text in texts:
        expected = [piece.encode() for piece in splitter(pattern)(text)]
        for level in ("scalar", *module.levels()):
            assert module.pieces(text, SCANNERS.index(pattern), level) == expected, (level, text)


@needs_engine
@pytest.mark.parametrize("pattern", SCANNERS[1:])
def test_levels_agree_on_any_bytes(pattern):
    module = engine("cpu")
    draw = random.Random(1)
    for size in (1, 2, 15, 16, 17, 63, 64, 65, 4095, 4096, 4400, 9000):
        for alphabet in (range(256), b" \n\r/'s!a1\xc2\xa0\xe3\x80\x80\xcc\x81"):
            text = bytes(draw.choices(alphabet, k=size))
            expected = module.pieces(text, SCANNERS.index(pattern), "scalar")
            for level in module.levels():
                assert module.pieces(text, SCANNERS.index(pattern), level) == expected


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", "o200k"])
def test_expressions_equal_onig(pattern):
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PUBLISHED[pattern]), "isolated")
    for text in [*ODD_TEXTS, all_planes(3000, seed=2), every_category()]:
        expected = [piece for piece, _ in split.pre_tokenize_str(text)]
        assert list(splitter(pattern)(text)) == expected


def _as_regex_has_it(text: str) -> str:
    """Without the characters whose class another version of Unicode changed."""
    regex = pytest.importorskip("regex")
    names = (r"\p{L}", r"\p{N}", r"\s", r"[\p{Lu}\p{Lt}]", r"\p{Ll}", r"\p{M}")
    classes = ((1, 2, 3), (5,), (6, 7), (1,), (2,), (4,))  # the same in unicode_classes
    same = [
        c
        for c in text
        if all(
            bool(regex.match(name, c)) == (class_table()[ord(c)] in numbers)
            for name, numbers in zip(names, classes)
        )
    ]
    return "".join(same)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_expressions_equal_regex(pattern):
    regex = pytest.importorskip("regex")
    for text in [*ODD_TEXTS, all_planes(3000, seed=5), every_category(60)]:
        text = _as_regex_has_it(text)
        assert list(splitter(pattern)(text)) == regex.findall(PUBLISHED[pattern], text)


@needs_engine
@pytest.mark.parametrize("pattern", PUBLISHED)
@EXAMPLES
@given(text=ANY_TEXT)
def test_scanners_equal_regex_on_any_text(pattern, text):
    regex = pytest.importorskip("regex")
    text = _as_regex_has_it(text)
    expected = [piece.encode() for piece in regex.findall(PUBLISHED[pattern], text)]
    module = engine("cpu")
    for level in module.levels():
        assert module.pieces(text, SCANNERS.index(pattern), level) == expected


# tiktoken ------------------------------------------------------------------------------------


def to_tiktoken(tokenizer: BPETokenizer, pattern: str):
    tiktoken = pytest.importorskip("tiktoken")
    special = tokenizer.special_tokens
    ranks = {t: i for i, t in enumerate(tokenizer.model.tokens) if t is not None}
    return tiktoken.Encoding(
        "test", pat_str=PUBLISHED[pattern], mergeable_ranks=ranks, special_tokens=special
    )


def test_gpt2_equals_tiktoken(backend):
    ours = gpt2(backend)
    theirs = to_tiktoken(gpt2(), "gpt2")
    for text in [*ODD_TEXTS, all_planes(2000, seed=3), corpus()[:20000]]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_gpt2_equals_tiktoken_on_a_corpus():
    theirs = to_tiktoken(gpt2(), "gpt2")
    for name in ("wikitext2.valid.txt", "tinyshakespeare.txt"):
        text = corpus(name)
        ids = gpt2().encode(text)
        assert ids == theirs.encode(text)
        assert gpt2().encode_numpy(text).tolist() == ids
        assert gpt2().count(text) == len(ids)
        assert gpt2().decode(ids) == text


@EXAMPLES
@given(ANY_TEXT)
def test_gpt2_equals_tiktoken_on_any_text(text):
    assert gpt2().encode(text) == _gpt2_tiktoken().encode(text, disallowed_special=())


_cache: dict = {}


def _gpt2_tiktoken():
    if "gpt2" not in _cache:
        _cache["gpt2"] = to_tiktoken(gpt2(), "gpt2")
    return _cache["gpt2"]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "llama3", "o200k"])
def test_trained_vocabularies_equal_tiktoken(pattern):
    text = corpus()[:300_000] + "".join(ODD_TEXTS) * 3
    ours = BPETokenizer.train([text], 3000, pattern=pattern)
    theirs = to_tiktoken(ours, pattern)
    for sample in [*ODD_TEXTS, all_planes(2000, seed=4), every_category(), text]:
        assert ours.encode(sample) == theirs.encode(sample)


@given(st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_invalid_bytes_equal_tiktoken(raw):
    ids = gpt2().encode(raw)
    assert ids == _gpt2_tiktoken()._encode_bytes(raw)
    assert gpt2().decode_bytes(ids) == raw


@pytest.mark.parametrize(
    "raw", [b"abc def \xff ghi jkl", b"  \n \xe2\x82", b"\xff", b"a  \xff", b"x \xed\xa0\x80 y"]
)
def test_invalid_bytes_after_text(backend, raw):
    assert gpt2(backend).encode(raw) == _gpt2_tiktoken()._encode_bytes(raw)


def test_surrogates_equal_tiktoken(backend):
    for text in ("\ud83d\ude00 a", "\ud83d a", "a\ude00", "\ude00\ud83d", "x\ud83d\ud83d\ude00"):
        assert gpt2(backend).encode(text) == _gpt2_tiktoken().encode(text)


def test_special_tokens_equal_tiktoken(backend):
    ours, theirs = gpt2(backend), _gpt2_tiktoken()
    end = "<|endoftext|>"
    for text in (end, f"a {end} b", f"{end}{end} ", f"  {end}\n{end}", "<|endof <|endoftext|"):
        assert ours.encode(text, allowed_special="all") == theirs.encode(
            text, allowed_special="all"
        )
        assert ours.encode(text, disallowed_special=()) == theirs.encode(
            text, disallowed_special=()
        )
    with pytest.raises(ValueError, match=r"special token '<\|endoftext\|>'"):
        ours.encode(end, disallowed_special="all")
    with pytest.raises(ValueError, match="special token"):
        ours.encode(end, allowed_special=set())
    assert ours.encode(end) == [50256]


def test_ranks_file_round_trip(tmp_path, backend):
    import base64

    text = corpus()[:200_000]
    trained = BPETokenizer.train([text], 1500, pattern="cl100k")
    path = tmp_path / "v.tiktoken"
    lines = [
        base64.b64encode(token) + b" " + str(id).encode()
        for id, token in enumerate(trained.model.tokens)
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    loaded = BPETokenizer.from_tiktoken(path, pattern="cl100k", backend=backend)
    theirs = to_tiktoken(trained, "cl100k")
    for sample in [*ODD_TEXTS, text[:5000]]:
        assert loaded.encode(sample) == theirs.encode(sample)


def test_ranks_that_merging_cannot_reach(backend):
    """A rank's pairs are all its cuts, and a whole piece that is a token stays one."""
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b"aa", b"ba", b"aaa", b"abc", b"cab", b"abcab", b"xyz"):
        ranks[token] = len(ranks)
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding(
        "test", pat_str=r"[a-c]+|.", mergeable_ranks=ranks, special_tokens={}
    )
    ours = BPETokenizer.from_tiktoken(ranks, pattern=r"[a-c]+|.", backend=backend)
    draw = random.Random(5)
    for _ in range(300):
        text = "".join(draw.choices("abcxyz", k=draw.randint(1, 90)))
        assert ours.encode(text) == theirs.encode(text)


# Hugging Face --------------------------------------------------------------------------------


def hf_gpt2():
    return gpt2().to_huggingface()


def test_to_huggingface_encodes_the_same():
    pytest.importorskip("tokenizers")
    theirs = hf_gpt2()
    for text in [*ODD_TEXTS, all_planes(2000, seed=6), every_category(), corpus()[:50_000]]:
        assert theirs.encode(text, add_special_tokens=False).ids == gpt2().encode(text)


@EXAMPLES
@given(ANY_TEXT)
def test_gpt2_equals_huggingface_on_any_text(text):
    assert gpt2().encode(text) == _gpt2_huggingface().encode(text).ids


def _gpt2_huggingface():
    if "huggingface" not in _cache:
        pytest.importorskip("tokenizers")
        _cache["huggingface"] = gpt2().to_huggingface()
    return _cache["huggingface"]


@pytest.mark.parametrize("pattern", ["whitespace", "llama3", "o200k", r"\d|\D+", None])
def test_huggingface_round_trip(pattern):
    pytest.importorskip("tokenizers")
    text = corpus()[:100_000]
    ours = BPETokenizer.train(
        text.splitlines(), 800, pattern=pattern, special_tokens=["<|endoftext|>"]
    )
    theirs = ours.to_huggingface()
    back = BPETokenizer.from_huggingface(theirs)
    assert back == ours
    for sample in [*ODD_TEXTS, "a<|endoftext|> b"]:
        assert theirs.encode(sample, add_special_tokens=False).ids == ours.encode(sample)


def test_huggingface_round_trip_of_characters():
    pytest.importorskip("tokenizers")
    # With and without merges that make the text of a special token, which the export leaves out.
    for text in (corpus()[:100_000], corpus()[:100_000].replace("<unk>", "")):
        ours = BPETokenizer.train([text], 500, mode="char")
        theirs = ours.to_huggingface()
        back = BPETokenizer.from_huggingface(theirs.to_str())
        assert (back == ours) == ("<unk>" not in text)
        for sample in ["The quick brown fox", " a  b\n", "漢 x", "a <eos> b", corpus()[:3000]]:
            ids = ours.encode(sample)
            assert theirs.encode(sample, add_special_tokens=False).ids == ids
            assert back.encode(sample) == ids


def test_canonical_pairs_of_ranks_encode_the_same():
    pytest.importorskip("tokenizers")
    text = corpus()[:100_000]
    trained = BPETokenizer.train([text], 900)
    ranks = {t: i for i, t in enumerate(trained.model.tokens)}
    loaded = BPETokenizer.from_tiktoken(ranks, pattern="gpt2")
    theirs = loaded.to_huggingface()
    assert theirs.encode(text[:20_000]).ids == loaded.encode(text[:20_000])
    assert loaded.encode(text) == trained.encode(text)


# Training ------------------------------------------------------------------------------------


def hf_train(texts, size, *, special_tokens=(), **options):
    """Tokens by id and merges of Hugging Face's byte-level trainer."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    from lmfast.tokenizer.byte_alphabet import from_stand_ins

    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens),
        **options,
    )
    theirs.train_from_iterator(texts, trainer)
    import json

    model = json.loads(theirs.to_str())["model"]
    return model["vocab"], [(from_stand_ins(a), from_stand_ins(b)) for a, b in model["merges"]]


@pytest.mark.parametrize(
    "options",
    [{}, {"min_frequency": 5}, {"max_token_length": 4}, {"max_token_length": 2}],
    ids=str,
)
@pytest.mark.parametrize("size", [300, 2000])
def test_training_equals_huggingface(options, size):
    texts = corpus()[:400_000].splitlines(keepends=True)
    specials = ["<|endoftext|>", "<s>"]
    vocab, merges = hf_train(texts, size, special_tokens=specials, **options)
    ours = BPETokenizer.train(texts, size, tie_break="ids", special_tokens=specials, **options)
    assert ours.merges == merges
    assert ours.vocab_size == len(vocab)


def test_training_where_a_merge_makes_a_special_token():
    texts = ["the the then there in the"] * 3
    for specials in (["the", "he"], ["t"], ["t", "h", " the"]):
        vocab, merges = hf_train(texts, 290, special_tokens=specials)
        ours = BPETokenizer.train(texts, 290, tie_break="ids", special_tokens=specials)
        assert ours.merges == merges
        assert ours.vocab_size == len(vocab)


@pytest.mark.parametrize("name", ["wikitext2.valid.txt", "tinyshakespeare.txt"])
def test_training_equals_huggingface_at_20000(name):
    texts = corpus(name).splitlines(keepends=True)
    _, merges = hf_train(texts, 20_000)
    assert BPETokenizer.train(texts, 20_000, tie_break="ids").merges == merges
