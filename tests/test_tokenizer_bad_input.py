"""Damaged files and wrong arguments: an error that names the entry, never a crash or a loop."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from tokenizer_support import ENGINES, gpt2, needs_engine

from lmfast.tokenizer import BPETokenizer, Model
from lmfast.tokenizer.backend import engine
from lmfast.tokenizer.byte_alphabet import BYTE_TO_CHAR


@pytest.fixture(params=ENGINES)
def backend(request):
    return request.param


def gpt2_files(tmp_path, change=None, merges="#version: 0.2\na b\nab c\n"):
    vocab = {BYTE_TO_CHAR[b]: b for b in range(256)} | {"ab": 256, "abc": 257, "<|end|>": 258}
    if change:
        change(vocab)
    encoder, bpe = tmp_path / "encoder.json", tmp_path / "vocab.bpe"
    encoder.write_text(vocab if isinstance(vocab, str) else json.dumps(vocab))
    bpe.write_text(merges)
    return encoder, bpe


def test_gpt2_files(tmp_path, backend):
    tokenizer = BPETokenizer.from_gpt2(*gpt2_files(tmp_path), backend=backend)
    assert tokenizer.encode("abc<|end|>") == [257, 258]
    assert tokenizer.special_tokens == {"<|end|>": 258}


@pytest.mark.parametrize(
    ("change", "merges", "message"),
    [
        (lambda v: v.pop("ab"), None, r"merge 0 \('a', 'b'\) needs the token 'ab'"),
        (lambda v: v.update(abc=256), None, "'ab' and 'abc' have the same id 256"),
        (lambda v: v.update(abc=-1), None, "id of 'abc' must be an int"),
        (lambda v: v.update(abc="7"), None, "id of 'abc' must be an int"),
        (lambda v: v.update(abc=2**40), None, "id of 'abc' must be an int"),
        (lambda v: v.pop("!"), None, "byte 0x21 is not in the vocabulary"),
        (None, "a b\na b\n", "merge 1 .* repeats an earlier pair"),
        (None, "a b c\n", "line 1 must be two tokens"),
        (None, "ab\n", "line 1 must be two tokens"),
        (None, "b c\n", "needs the token 'bc'"),
        (lambda v: v.update({"漢b": 259}), "漢 b\n", "needs the token '漢'"),
    ],
)
def test_damaged_gpt2_files(tmp_path, change, merges, message):
    files = gpt2_files(tmp_path, change, merges or "a b\nab c\n")
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_gpt2(*files)


def test_files_that_are_not_json(tmp_path):
    path = tmp_path / "t.json"
    for content in (b"{", b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"format": "x"}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.json"):
            BPETokenizer.load(path)
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99 is not 1"),
        (lambda d: d.pop("tokens"), "entry 'tokens' is missing"),
        (lambda d: d.update(tokens={}), "'tokens' is a dict"),
        (lambda d: d["tokens"].__setitem__(3, 7), r"tokens\[3\] must be text"),
        (lambda d: d["tokens"].__setitem__(3, {"base64": "!"}), r"tokens\[3\]: '!' is not base64"),
        (lambda d: d["tokens"].__setitem__(3, ""), "token 3 is empty"),
        (lambda d: d["tokens"].__setitem__(3, d["tokens"][4]), "has two ids, 3 and 4"),
        (lambda d: d["merges"].__setitem__(0, [1, 2]), r"merges\[0\] must be"),
        (lambda d: d["merges"].__setitem__(0, [1, 2, 10**9, 0]), "merge 0 .* outside"),
        (lambda d: d["merges"].__setitem__(0, [1, 2, -1, 0]), "merge 0 .* outside"),
        (lambda d: d["merges"].__setitem__(0, [256, 2, 256, 0]), "merge 0 .* do not make"),
        (lambda d: d["merges"].append(d["merges"][0]), "repeats an earlier pair"),
        (lambda d: d["merges"].reverse(), "out of rank order"),
        (lambda d: d.update(special_tokens={"<x>": 10**9}), "id of the special token '<x>' must"),
        (lambda d: d.update(special_tokens={"<x>": "1"}), "must be an int"),
        (lambda d: d.update(special_tokens={"": 1}), "non-empty str"),
        (lambda d: d.update(special_tokens={"<x>": 1, "<y>": 1}), "share the id 1"),
        (lambda d: d.update(mode="word"), "mode must be one of"),
    ],
)
def test_damaged_own_files(tmp_path, change, message):
    path = tmp_path / "t.json"
    BPETokenizer.train(["abcabcabc abab"], 260).save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        BPETokenizer.load(path)


def test_a_cycle_of_merges(backend):
    """A token that is made of itself cannot be described: its parts do not give its bytes."""
    tokens = tuple([bytes([b]) for b in range(256)] + [b"ab"])
    with pytest.raises(ValueError, match=r"merge 0 \(256, 98\) -> 256"):
        Model(mode="byte", pattern=None, tokens=tokens, merges=np.array([[256, 98, 256, 0]]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nYQ== 1\n", "line 2 repeats the token b'a'"),
        (b"YQ==\n", "line 1 must be base64 and a rank"),
        (b"YQ== x\n", "line 1 must be base64 and a rank"),
        (b"!! 0\n", "line 1: b'!!' is not base64"),
        (b"YQ== 0\nYg== 0\n", "b'a' and b'b' have the same rank 0"),
        (b"YQ== 0\n", "byte 0x00 is not in the vocabulary"),
        (b"YQ== 99999999999\n", "rank of b'a' must be an int in"),
    ],
)
def test_damaged_ranks(tmp_path, content, message):
    path = tmp_path / "r.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_tiktoken(path, pattern="gpt2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "WordPiece"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"model": {"vocab": {}, "merges": ["a b"], "dropout": 0.1}}, "dropout"),
        ({"model": {"vocab": {}, "merges": ["ab"]}}, "merge 0 must be a pair"),
    ],
)
def test_foreign_tokenizers(change, message):
    document = {
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        **change,
    }
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_huggingface(json.dumps(document))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 100}, ValueError, "vocab_size must be at least 256"),
        ({"vocab_size": 0, "mode": "char"}, ValueError, "vocab_size must be at least 1"),
        ({"vocab_size": "many"}, TypeError, "vocab_size must be an int"),
        ({"vocab_size": 300.0}, TypeError, "vocab_size must be an int"),
        ({"vocab_size": [300, True]}, TypeError, "vocab_size must be an int"),
        ({"vocab_size": []}, ValueError, "vocab_size must hold a size"),
        ({"vocab_size": 2**21}, ValueError, "vocab_size must be at most 2097151"),
        ({"mode": "word"}, ValueError, "mode must be one of"),
        ({"tie_break": "random"}, ValueError, "tie_break must be one of"),
        ({"min_frequency": -1}, ValueError, "min_frequency must be at least 0"),
        ({"min_frequency": 1.5}, TypeError, "min_frequency must be an int"),
        ({"max_token_length": "3"}, TypeError, "max_token_length must be an int"),
        ({"special_tokens": "<s>"}, TypeError, "special_tokens must be a sequence"),
        ({"special_tokens": [1]}, TypeError, "special_tokens must hold str"),
        ({"special_tokens": ["\ud800"]}, ValueError, "hold surrogates"),
        ({"progress": 3}, TypeError, "progress must be callable"),
        ({"threads": "2"}, TypeError, "threads must be an int"),
        ({"mode": "char", "marker": 3}, TypeError, "marker must be a str"),
        ({"corpus": {3: 1}}, TypeError, "corpus must map str or bytes"),
        ({"corpus": {"ab": 2**62}}, ValueError, "add up to less than 2"),
        ({"max_token_length": 0}, ValueError, "max_token_length must be at least 1"),
        ({"corpus": 3}, TypeError, "corpus must be text"),
        ({"corpus": [3]}, TypeError, "corpus must yield"),
        ({"corpus": {"a": -1}}, ValueError, "count of 'a' must be"),
        ({"corpus": {"a": 1.5}}, TypeError, "count of 'a' must be"),
        ({"pattern": "words"}, ValueError, "char mode only"),
        ({"mode": "char", "pattern": "gpt2"}, ValueError, 'pattern must be "words"'),
        ({"mode": "char", "marker": "ab"}, ValueError, "marker must be one character"),
        ({"mode": "char", "special_tokens": ["<pad>"]}, ValueError, "unk_token"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"pattern": 3}, TypeError, "pattern must be a str"),
    ],
)
def test_training_arguments(options, error, message):
    options = {"corpus": ["a b"], "vocab_size": 300, **options}
    with pytest.raises(error, match=message):
        BPETokenizer.train(options.pop("corpus"), options.pop("vocab_size"), **options)


def test_a_pattern_that_is_no_expression():
    pytest.importorskip("regex")
    with pytest.raises(ValueError, match="is not a regular expression"):
        BPETokenizer.train(["a"], 300, pattern="(")


def test_call_arguments(backend):
    tokenizer = gpt2(backend)
    for text in (3, None, ["a"], bytearray(b"a")):
        with pytest.raises(TypeError, match="text must be a str or bytes"):
            tokenizer.encode(text)
    with pytest.raises(TypeError, match=r"texts\[1\] must be"):
        tokenizer.encode_batch(["a", 3])
    with pytest.raises(ValueError, match="allowed_special holds '<x>'"):
        tokenizer.encode("a", allowed_special={"<x>"})
    with pytest.raises(ValueError, match="max_tokens must be at least 0"):
        tokenizer.truncate("a", -1)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\]"):
        tokenizer.encode("a", dropout=2.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.truncate("ab", "3"), TypeError, "max_tokens must be an int, got '3'"),
        (lambda t: t.truncate("ab", 1.5), TypeError, "max_tokens must be an int, got 1.5"),
        (lambda t: t.truncate("ab", None), TypeError, "max_tokens must be an int, got None"),
        (lambda t: t.encode_batch(["a"], threads="2"), TypeError, "threads must be an int"),
        (lambda t: t.encode_batch(["a"], threads=1.5), TypeError, "threads must be an int"),
        (lambda t: t.encode_batch(["a"], threads=0), ValueError, "threads must be at least 1"),
        (lambda t: t.encode_batch("ab"), TypeError, "texts must be an iterable of str or bytes"),
        (lambda t: t.encode("a", allowed_special=3), TypeError, "allowed_special must be None"),
        (lambda t: t.encode("a", disallowed_special="<x>"), TypeError, "disallowed_special must"),
        (lambda t: t.encode("a", disallowed_special=[3]), TypeError, "must hold str, got 3"),
        (lambda t: t.encode("ab", dropout=[]), TypeError, r"dropout must be a float, got \[\]"),
        (lambda t: t.encode("ab", seed="x"), TypeError, "seed must be an int or None, got 'x'"),
        (lambda t: t.id_to_token("a"), TypeError, "id must be an int, got 'a'"),
        (lambda t: t.id_to_token(1.5), TypeError, "id must be an int, got 1.5"),
        (lambda t: t.id_to_token(-1), ValueError, "id must be at least 0, got -1"),
        (lambda t: t.token_to_id([1]), TypeError, "token must be a str or bytes"),
        (lambda t: t.token_to_id(3), TypeError, "token must be a str or bytes"),
        (lambda t: t.decode([[1]], skip_special_tokens=True), TypeError, r"ids\[0\] must be"),
        (lambda t: t.decode(([1], [1, 2])), TypeError, "ids must be a one-dimensional"),
        (lambda t: t.decode([0, 9999], skip_special_tokens=True), ValueError, r"ids\[1\] is 9999"),
        (lambda t: t.offsets("ab", dropout=0.1), TypeError, r"offsets\(\).*'dropout'"),
        (lambda t: BPETokenizer.load(12345), TypeError, "path must be a str or os.PathLike"),
        (
            lambda t: t.decode(np.array([65, 2**32 - 1], dtype=np.uint32)),
            ValueError,
            r"ids\[1\] is 4294967295, which is not",
        ),
    ],
)
def test_wrong_calls(backend, call, error, message):
    tokenizer = BPETokenizer.train([""], 257, special_tokens=["<x>"], backend=backend)
    with pytest.raises(error, match=message):
        call(tokenizer)


def test_unusual_types_that_are_right(backend):
    tokenizer = BPETokenizer.train(["ab ab"], 259, special_tokens=["<x>"], backend=backend)
    for order in "<>":
        for kind in ("i2", "i4", "u4", "i8"):
            ids = np.array(tokenizer.encode("AB"), dtype=order + kind)
            assert tokenizer.decode(ids) == "AB"
    assert tokenizer.encode_batch(["ab"], threads=10**12)[0].tolist() == tokenizer.encode("ab")
    once = tokenizer.encode_batch(["<x>", "<x>"], allowed_special=iter(["<x>"]))
    assert [ids.tolist() for ids in once] == [[0], [0]]
    plain = tokenizer.encode("ab ab", dropout=0.5, seed=3)
    assert tokenizer.encode("ab ab", dropout=np.float32(0.5), seed=np.int64(3)) == plain


@pytest.mark.parametrize("ids", [[0, 50257], [0, -1], [0, 2**31], [0, 2**70]])
def test_unknown_ids(backend, ids):
    message = rf"ids\[1\] is {ids[1]}, which is not in the vocabulary"
    with pytest.raises(ValueError, match=message):
        gpt2(backend).decode(ids)
    if abs(ids[1]) < 2**62:
        with pytest.raises(ValueError, match=message):
            gpt2(backend).decode(np.array(ids, dtype=np.int64))


def test_decode_arguments(backend):
    tokenizer = gpt2(backend)
    for ids in (np.zeros((2, 2), dtype=np.int64), np.array([1.5]), "abc"):
        with pytest.raises(TypeError, match="ids must be a one-dimensional"):
            tokenizer.decode(ids)
    for wrong in ("a", 1.0, None):
        with pytest.raises(TypeError, match=r"ids\[1\] must be an int, got"):
            tokenizer.decode([0, wrong])
    with pytest.raises(ValueError, match="errors must be"):
        tokenizer.decode([1], errors="none")
    part = tokenizer.encode("漢")[:1]
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(part, errors="strict")
    assert tokenizer.decode(part) == "\ufffd"
    assert tokenizer.decode(part, errors="ignore") == ""
    for kind in (np.int16, np.int32, np.uint32, np.int64, np.uint8):
        assert tokenizer.decode(np.array([64, 65], dtype=kind)) == "ab"
    assert tokenizer.decode(np.arange(128)[64:70:2]) == tokenizer.decode([64, 66, 68])


@needs_engine
def test_the_engine_guards_itself():
    """What the Python layer never passes must still not crash the process."""
    module = engine("cpu")
    tokens, symbols = [bytes([b]) for b in range(256)], np.arange(256, dtype=np.int32)
    none = module.Specials([])

    def make(**change):
        arguments = {
            "pattern": 4,
            "characters": False,
            "whole_piece": False,
            "marker": -1,
            "unk": -1,
            "tokens": tokens,
            "symbols": symbols,
            "merges": np.zeros((0, 4), dtype=np.int32),
            "specials": none,
            **change,
        }
        return module.Encoder(**arguments)

    for merge in ([0, 1, 999, 0], [999, 0, 1, 0], [-1, 0, 1, 0]):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            make(merges=np.array([merge], dtype=np.int32))
    for change in ({"symbols": symbols[:9]}, {"characters": True}, {"symbols": symbols + 9}):
        with pytest.raises(ValueError):
            make(**change)
    for ends in ([5], [-1], [2, 1]):
        with pytest.raises(ValueError, match="piece end"):
            make().encode("abc", none, np.array(ends, dtype=np.int64))
    with pytest.raises(ValueError, match="do not cover"):
        module.set_character_classes(b"\x08")


class Derived(BPETokenizer):
    """Has a place of its own to be found by pickle."""


def test_a_subclass_stays_one_through_copies(tmp_path):
    tokenizer = Derived.train(["a b"], 256)
    tokenizer.save(tmp_path / "t.json")
    copies = copy.copy(tokenizer), pickle.loads(pickle.dumps(tokenizer))
    for each in (*copies, Derived.load(tmp_path / "t.json")):
        assert type(each) is Derived
        assert each == tokenizer


def test_errors_name_what_was_asked_for(tmp_path):
    tokenizer = BPETokenizer.train(["a b"], 256)
    missing = tmp_path / "no" / "t.json"
    with pytest.raises(FileNotFoundError) as error:
        tokenizer.save(missing)
    assert error.value.filename == str(missing)
    with pytest.raises(TypeError, match="encode_batch"):
        tokenizer.encode(["a", "b"])
    with pytest.raises(TypeError, match="got generator of shape"):
        tokenizer.decode(i for i in (1, 2))
