"""Entries that contradict each other, ids out of range, and what would be dropped silently."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

from lmfast.tokenizer import BPETokenizer, Model
from lmfast.tokenizer.byte_alphabet import BYTE_TO_CHAR

RANKS = {bytes([b]): b for b in range(256)}


def byte_model(**change) -> Model:
    fields = {
        "mode": "byte",
        "pattern": "gpt2",
        "tokens": tuple(RANKS),
        "merges": np.zeros((0, 4), dtype=np.int64),
        **change,
    }
    return Model(**fields)


def hf_document(**change) -> dict:
    vocab = {BYTE_TO_CHAR[b]: b for b in range(256)} | {"ab": 256}
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "added_tokens": [{"content": "<x>", "id": 257}],
        **change,
    }


def hf_characters() -> dict:
    split = {"type": "Split", "pattern": {"Regex": r"[\s\x1c-\x1f]+"}, "behavior": "Removed"}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    return {
        "model": {
            "type": "BPE",
            "vocab": {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3},
            "merges": [["▁", "a"]],
            "unk_token": "<unk>",
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, space]},
        "added_tokens": [{"content": "<unk>", "id": 0}],
    }


@pytest.mark.parametrize("pattern", ["", "none"])
def test_names_of_no_splitting(pattern):
    with pytest.raises(ValueError, match="for no splitting it must be None"):
        BPETokenizer.train(["a b"], 257, pattern=pattern)
    with pytest.raises(ValueError, match="for no splitting it must be None"):
        byte_model(pattern=pattern)


def test_special_tokens_on_taken_ids(tmp_path):
    message = "special token '<x>' has the id 98 of the token b'b'"
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_tiktoken(RANKS, pattern="gpt2", special_tokens={"<x>": 98})
    with pytest.raises(ValueError, match=message):
        byte_model(special_tokens={"<x>": 98})
    document = hf_document(added_tokens=[{"content": "<x>", "id": 98}])
    with pytest.raises(ValueError, match=f"tokenizer.json: {message}"):
        BPETokenizer.from_huggingface(json.dumps(document))
    path = tmp_path / "t.json"
    BPETokenizer(byte_model()).save(path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "special_tokens": {"<x>": 98}}))
    with pytest.raises(ValueError, match=rf"t\.json: {message}"):
        BPETokenizer.load(path)
    same = byte_model(special_tokens={"b": 98})
    assert BPETokenizer(same).decode([98]) == "b"


@pytest.mark.parametrize(
    "id",
    [2**60, 2**32, pytest.param(10**5000, id="huge"), -1, "98", 300.0, True, None],
)
def test_ids_of_special_tokens(id):
    message = r"id of the special token '<x>' must be an int in \[0, 2\^21\)"
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_tiktoken(RANKS, pattern="gpt2", special_tokens={"<x>": id})
    with pytest.raises(ValueError, match=message):
        byte_model(special_tokens={"<x>": id})


def test_special_tokens_that_are_stand_ins():
    for text in ("é", "Ġ"):
        tokenizer = BPETokenizer(byte_model(tokens=(*RANKS, None), special_tokens={text: 256}))
        assert tokenizer.encode(text) == [256]
        message = f"special token {text!r} is the name of the token"
        pytest.importorskip("tokenizers")
        with pytest.raises(ValueError, match=message):
            tokenizer.to_huggingface()
        pytest.importorskip("transformers")
        from lmfast.integrations.transformers_tokenizer import LMFastTokenizer

        with pytest.raises(ValueError, match=message):
            LMFastTokenizer(tokenizer=tokenizer)


def test_tokens_that_hold_a_special_token_are_not_exported():
    """Their text is matched before merging, and a vocabulary has one id for a name."""
    pytest.importorskip("tokenizers")
    made = (b"th", b"the", b" the", b"then")
    ours = BPETokenizer.from_tiktoken(
        RANKS | {token: 256 + i for i, token in enumerate(made)},
        pattern="gpt2",
        special_tokens={"the": 260},
    )
    assert (ours.model.ids[b"the"], ours.special_tokens["the"]) == (257, 260)
    theirs = ours.to_huggingface()
    for text in ("the", "then the he th there", " thethe"):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_a_model_does_not_change():
    merges = np.array([[97, 98, 256, 0]])
    model = byte_model(tokens=(*RANKS, b"ab", None), merges=merges, special_tokens={"<x>": 257})
    merges[0] = 0
    assert model.merges.tolist() == [[97, 98, 256, 0]]
    trained = BPETokenizer.train(["abab"], 258, special_tokens=["<x>"]).model
    for each in (model, trained, pickle.loads(pickle.dumps(model)), copy.deepcopy(trained)):
        with pytest.raises(TypeError):
            each.special_tokens["zz"] = 3
        with pytest.raises(TypeError):
            each.ids[b"zz"] = 3
        with pytest.raises(ValueError, match="read-only"):
            each.merges[0] = 0
    copied = pickle.loads(pickle.dumps(model))
    assert BPETokenizer(copied) == BPETokenizer(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].pop("vocab"), "vocab must be an object"),
        (lambda d: d["model"].update(vocab=["a"]), "vocab must be an object"),
        (lambda d: d["model"].update(merges=[3]), "merge 0 must be a pair, got 3"),
        (lambda d: d["model"].update(merges=None), "merges must be a list"),
        (lambda d: d["model"].update(merges=[["a", 1]]), "merge 0 must be a pair"),
        (lambda d: d["model"]["vocab"].update(ab=-1), "id of 'ab' must be an int"),
        (lambda d: d["model"]["vocab"].update(ab=97), "'a' and 'ab' have the same id 97"),
        (lambda d: d["model"]["vocab"].update({"<x>": 300}), "'<x>' has the id 300 and, as"),
        (lambda d: d.update(added_tokens=3), "added_tokens must be a list"),
        (lambda d: d.update(added_tokens=[{}]), r"added_tokens\[0\] has no content"),
        (lambda d: d.update(added_tokens=[3]), r"added_tokens\[0\] has no content"),
        (lambda d: d["added_tokens"][0].update(id="3"), r"added_tokens\[0\]: the id must be"),
        (lambda d: d["added_tokens"][0].update(id=2**60), r"added_tokens\[0\]: the id must be"),
        (lambda d: d["added_tokens"].append(d["added_tokens"][0]), "repeats '<x>'"),
        (lambda d: d["added_tokens"].append({"content": "y2", "id": 257}), "share the id 257"),
        (lambda d: d.update(pre_tokenizer="x"), "pre_tokenizer must be a step"),
        (lambda d: d.update(pre_tokenizer={"type": "Sequence"}), "pre-tokenizer Sequence"),
        (lambda d: d.update(truncation={"max_length": 3}), "truncation is set"),
        (lambda d: d.update(padding={"pad_id": 3}), "padding is set"),
        (
            lambda d: d.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<x>"}}, {"Sequence": {"id": "A"}}],
                }
            ),
            "TemplateProcessing: special_tokens is None",
        ),
    ],
)
def test_damaged_huggingface_files(tmp_path, change, message):
    path = tmp_path / "hf.json"
    document = hf_document()
    path.write_text(json.dumps(document))
    assert BPETokenizer.from_huggingface(path).encode("ab<x>") == [256, 257]
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"hf\.json: .*{message}"):
        BPETokenizer.from_huggingface(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(vocab={}, merges=[]), "marker '▁' is not a character"),
        (lambda d: d["model"].update(unk_token=[]), "unknown token must be a str or None"),
        (lambda d: d["model"]["vocab"].update({"▁a": 2**60}), "id of '▁a' must be an int"),
        (lambda d: d["model"]["vocab"].update({"▁a": -1}), "id of '▁a' must be an int"),
        (lambda d: d["model"]["vocab"].update({"▁a": 2}), "'a' and '▁a' have the same id 2"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][1].pop("replacement"), "no replacement"),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(prepend_scheme="never"),
            "does not mark every word",
        ),
    ],
)
def test_damaged_huggingface_files_of_characters(change, message):
    document = hf_characters()
    assert BPETokenizer.from_huggingface(json.dumps(document)).encode("a b") == [3, 1, 0]
    change(document)
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
        BPETokenizer.from_huggingface(json.dumps(document))


def test_huggingface_text_that_is_not_json():
    for text in ("{bad", '{"model": {}, "model": {}}', '{"model": ' + "9" * 5000 + "}"):
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a JSON file"):
            BPETokenizer.from_huggingface(text)


def test_the_last_call_of_a_transformers_tokenizer_is_no_part_of_it():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    ours = BPETokenizer.train(["abab abab"], 260)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.to_huggingface())
    assert isinstance(fast.backend_tokenizer, tokenizers.Tokenizer)
    fast("abab abab", truncation=True, max_length=1)
    assert BPETokenizer.from_huggingface(fast) == ours


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("byte", {"unk": "<unk>"}, "unk must be None"),
        ("byte", {"pattern": "("}, "is not a regular expression"),
        ("byte", {"pattern": "none"}, "for no splitting it must be None"),
        ("byte", {"version": True}, "version True is not 1"),
        ("byte", {"special_tokens": {"\ud800": 3}}, "holds surrogates"),
        ("byte", {"tokens": ["\udfff"]}, r"tokens\[0\]: '\\udfff' holds surrogates"),
        ("char", {"tokens": [{"base64": "/w=="}]}, "is not UTF-8"),
        ("char", {"marker": "\ud800"}, "marker must be text without surrogates"),
        ("byte", {"marker": "\ud800"}, "marker must be text without surrogates"),
    ],
)
def test_damaged_own_entries(tmp_path, mode, change, message):
    if "(" in change.values():
        pytest.importorskip("regex")
    path = tmp_path / "t.json"
    BPETokenizer.train(["abab"], 258 if mode == "byte" else 4, mode=mode).save(path)
    document = json.loads(path.read_text())
    if mode == "char" and "tokens" in change:
        change = {"tokens": [*document["tokens"], *change["tokens"]]}
    path.write_text(json.dumps({**document, **change}))
    with pytest.raises(ValueError, match=rf"t\.json: .*{message}"):
        BPETokenizer.load(path)


def test_numbers_of_many_digits_and_repeated_keys(tmp_path):
    path = tmp_path / "t.json"
    BPETokenizer.train(["abab"], 258).save(path)
    text = path.read_text()
    for old, new in (('"version":1', '"version":' + "1" * 5000), ('"unk":', '"unk":"a","unk":')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"t\.json: not a JSON file"):
            BPETokenizer.load(path)
    ranks = tmp_path / "r.tiktoken"
    ranks.write_bytes(b"YQ== " + b"1" * 5000)
    with pytest.raises(ValueError, match=r"r\.tiktoken: line 1 must be base64 and a rank"):
        BPETokenizer.from_tiktoken(ranks, pattern="gpt2")


def test_gpt2_files_with_repeats_and_byte_order_marks(tmp_path):
    vocab = {BYTE_TO_CHAR[b]: b for b in range(256)} | {"ab": 256}
    encoder, bpe = tmp_path / "encoder.json", tmp_path / "vocab.bpe"
    encoder.write_text(json.dumps(vocab), encoding="utf-8-sig")
    bpe.write_text("#version: 0.2\na b\n", encoding="utf-8-sig")
    assert BPETokenizer.from_gpt2(encoder, bpe).encode("ab") == [256]
    encoder.write_text(json.dumps(vocab)[:-1] + ', "ab": 257}')
    with pytest.raises(ValueError, match=r"encoder\.json: .*the key 'ab' occurs twice"):
        BPETokenizer.from_gpt2(encoder, bpe)
