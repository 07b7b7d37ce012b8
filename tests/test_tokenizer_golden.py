"""The golden numbers of the specification, on the engine and on the reference."""

import pytest
from tokenizer_support import ENGINES

from lmfast.tokenizer import BPETokenizer
from lmfast.tokenizer.backend import engine

WORDS = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
MERGES = "e+s es+t _+l _l+o _lo+w _+n _n+e _ne+w _new+est _+w _w+i _wi+d _wid+est _low+e _lowe+r"
COUNTS = [9, 9, 7, 7, 7, 6, 6, 6, 6, 3, 3, 3, 3, 2, 2]


@pytest.fixture(params=ENGINES)
def backend(request):
    return request.param


def train(corpus, size, backend, **options):
    options = {"mode": "char", "marker": "_", **options}
    return BPETokenizer.train(corpus, size, backend=backend, **options)


def joined(tokenizer):
    return ["+".join(pair) for pair in tokenizer.merges]


def test_merges_of_four_words(backend):
    tokenizer = train(WORDS, 1000, backend)
    assert joined(tokenizer) == MERGES.split()
    # 11 characters and 15 merges, and the 4 special tokens before them.
    assert tokenizer.vocab_size == 26 + 4


def test_merge_counts(backend):
    module = engine(backend)
    counter = module.Counter(1)
    counter.add_words([w.encode() for w in WORDS], list(WORDS.values()))
    _, _, counts = module.learn(counter, None, "_", 0, 0, 1000, 0, 0, -1, {}, None)
    assert counts.tolist() == COUNTS


@pytest.mark.parametrize(
    ("word", "tokens"),
    [
        ("lowest", ["_low", "est"]),
        ("newer", ["_new", "e", "r"]),
        ("widen", ["_wid", "e", "n"]),
        ("xlow", ["_", "<unk>", "l", "o", "w"]),
        ("", []),
        ("  ", []),
    ],
)
def test_encoding_with_four_words(backend, word, tokens):
    tokenizer = train(WORDS, 1000, backend)
    assert [tokenizer.id_to_token(i).decode() for i in tokenizer.encode(word)] == tokens


def test_overlapping_occurrences_count(backend):
    assert joined(train(["aaaa aaa aa"], 6, backend)) == ["a+a", "_+aa", "_aa+aa", "_aa+a"]


def test_first_met_pairs(backend):
    got = joined(train(["hello help held hell"], 100, backend))
    assert got[:4] == ["_+h", "_h+e", "_he+l", "_hel+l"]


@pytest.mark.parametrize(("tie_break", "merge"), [("first", "_+z"), ("lexicographic", "_+a")])
def test_ties(backend, tie_break, merge):
    assert joined(train(["zb ab"], 5, backend, tie_break=tie_break)) == [merge]


def test_bytes(backend):
    words = {"é": 1, "éé": 1, "e": 1}
    tokenizer = BPETokenizer.train(words, 300, pattern=None, backend=backend)
    assert tokenizer.merges == [(b"\xc3", b"\xa9"), (b"\xc3\xa9", b"\xc3\xa9")]


@pytest.mark.parametrize("size", [1, 3])
def test_no_room_for_merges(backend, size):
    assert train(["ab"], size, backend).merges == []


def test_empty_corpus(backend):
    tokenizer = train([], 50, backend)
    assert tokenizer.merges == []
    assert tokenizer.encode("ab") == [4, tokenizer.unk_id, tokenizer.unk_id]


def test_ids_are_specials_then_alphabet_then_merges(backend):
    tokenizer = train(["ba ba"], 5, backend)
    assert tokenizer.special_tokens == {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3}
    assert [tokenizer.id_to_token(i).decode() for i in range(4, 9)] == ["_", "a", "b", "_b", "_ba"]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)


@pytest.mark.parametrize("text", [r"a\n \1 .* [x] $^ (((", "𝔘𝔫𝔦 ❤️‍🔥 𐍈", "_ a_b __"])
def test_odd_characters_are_plain_symbols(backend, text):
    tokenizer = train([text] * 3, 1000, backend)
    if "_" not in text:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unk_id not in tokenizer.encode(text)


def test_special_tokens_are_never_split(backend):
    tokenizer = train(["< eos > bos"], 40, backend)
    ids = tokenizer.encode("bos <eos> bos<bos>")
    assert ids.count(3) == 1
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == "bos <eos> bos <bos>"


def test_segmentations_of_the_trained_words():
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    for backend in ("auto", "reference"):
        t = BPETokenizer.train(words, 26, mode="char", marker="_", backend=backend)
        assert t.segmentations(words) == {
            ("_low",): 5,
            ("_lower",): 2,
            ("_newest",): 6,
            ("_widest",): 3,
        }

        assert t.segmentations(["low lowest"]) == {("_low",): 1, ("_low", "est"): 1}
        with pytest.raises(ValueError, match="the counts are of mode 'byte'"):
            t.segmentations(BPETokenizer.count_words(["a"]))
    t = BPETokenizer.train(["ab ab abc"], 258)
    assert t.segmentations(["ab ab abc"]) == {(b"ab",): 1, (b" ab",): 1, (b" ab", b"c"): 1}


def test_a_tokenizer_is_immutable():
    t = BPETokenizer.train(["ab ab ab"], 258)
    for name in ("_model", "_encode_text", "pattern", "anything"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(t, name, None)
    with pytest.raises(AttributeError, match="immutable"):
        del t._model
    with pytest.raises(AttributeError):
        t.model.pattern = None
    with pytest.raises(TypeError):
        t.model.special_tokens["<x>"] = 3
    with pytest.raises(ValueError, match="read-only"):
        t.model.merges[0] = 0
    assert t.encode("ab ab") == [256, 257]
