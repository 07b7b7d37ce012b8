"""Files of Hugging Face's tokenizers as models are published with: what they add, normalize, match
and split by is theirs, ids and all."""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmfast import BPETokenizer
from lmfast.tokenizer.normalization import FORMS, is_normal, normalize, normalize_with_places
from lmfast.tokenizer.patterns import PUBLISHED

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("regex")

CORPUS = [
    "the cat sat on the mat, 1234 times; don't we'll see 12 3.5!\n\n  def f(x):\n    return x+1\n",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m "
    "\u4f60\u597d\u4e16\u754c \u0434\u043e\u043c \U0001f600 the the cat",
]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def token(content, **options):
    special = options.pop("special", True)
    return tokenizers.AddedToken(content, special=special, **{"normalized": False, **options})


def around(single, pair, **ids):
    return tokenizers.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(ids.items())
    )


def splits(*patterns):
    pre = tokenizers.pre_tokenizers
    parts = [pre.Split(tokenizers.Regex(p), "isolated") for p in patterns]
    return pre.Sequence([*parts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def llama3(t):
    t.pre_tokenizer = splits(PUBLISHED["llama3"])
    t.add_special_tokens([token("<|begin_of_text|>"), token("<|eot_id|>")])
    bos = t.token_to_id("<|begin_of_text|>")
    template = around(
        "<|begin_of_text|> $A",
        "<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        **{"<|begin_of_text|>": bos},
    )
    level = tokenizers.processors.ByteLevel(trim_offsets=False)
    t.post_processor = tokenizers.processors.Sequence([level, template])


def gpt_neox(t):
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.add_special_tokens([token("<|endoftext|>"), token("<|padding|>")])
    runs = [token(" " * n, special=False, normalized=True) for n in range(24, 1, -1)]
    t.add_tokens(runs)
    t.post_processor = tokenizers.processors.ByteLevel(add_prefix_space=False, trim_offsets=True)


def qwen2(t):
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = splits(QWEN2)
    t.add_special_tokens([token("<|endoftext|>"), token("<|im_start|>"), token("<|im_end|>")])
    t.add_tokens([token("<tool_call>", special=False), token("</tool_call>", special=False)])
    t.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)


def starcoder(t):
    pre = tokenizers.pre_tokenizers
    t.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    t.add_special_tokens([token("<|endoftext|>"), token("<fim_prefix>")])


def deepseek(t):
    pre = tokenizers.pre_tokenizers
    t.normalizer = tokenizers.normalizers.Sequence([])
    t.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex("[\r\n]"), "isolated"),
            pre.Split(tokenizers.Regex(r"\s?\p{L}+"), "isolated"),
            pre.Split(tokenizers.Regex(r"\s?\p{P}+"), "isolated"),
            pre.Digits(individual_digits=True),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    begin = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    t.add_special_tokens([token(begin, normalized=True)])
    t.add_tokens([token("<\uff5cUser\uff5c>", special=False, normalized=False)])
    bos = t.token_to_id(begin)
    t.post_processor = around(f"{begin} $A", f"{begin} $A {begin}:1 $B:1", **{begin: bos})


def falcon_like(t):
    pre = tokenizers.pre_tokenizers
    t.pre_tokenizer = pre.Sequence(
        [
            pre.Punctuation(behavior="contiguous"),
            pre.Digits(individual_digits=False),
            pre.Split("the", "isolated"),
            pre.ByteLevel(add_prefix_space=False),
        ]
    )


def roberta(t):
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.add_special_tokens([token("<s>"), token("</s>"), token("<mask>", lstrip=True)])
    sep, cls = ((text, t.token_to_id(text)) for text in ("</s>", "<s>"))
    t.post_processor = tokenizers.processors.RobertaProcessing(sep, cls, add_prefix_space=False)


def bert_like(t):
    t.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKD(), tokenizers.normalizers.NFC()]
    )
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.add_special_tokens([token("[CLS]"), token("[SEP]")])
    sep, cls = ((text, t.token_to_id(text)) for text in ("[SEP]", "[CLS]"))
    t.post_processor = tokenizers.processors.BertProcessing(sep, cls)


def every_flag(t):
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.add_special_tokens([token("<a>", rstrip=True), token("<b>", lstrip=True, rstrip=True)])
    t.add_tokens(
        [
            token("cat", special=False, single_word=True),
            token("caf\u00e9", special=False, normalized=True),
            token("!<", special=False, normalized=True, lstrip=True),
            token("the c", special=False, normalized=False),
        ]
    )


FAMILIES = {
    f.__name__: f
    for f in (
        llama3, gpt_neox, qwen2, starcoder, deepseek, falcon_like, roberta, bert_like, every_flag,
    )
}  # fmt: skip
MARKED = (
    "<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<tool_call>", "<mask>", "<s>", "[SEP]",
    "<a>", "<b>", "cat", "caf\u00e9", "cafe\u0301", "!<", "the c", "<\uff5cUser\uff5c>", "the",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)  # fmt: skip


@functools.cache
def built(family, ignore_merges=False):
    """Their tokenizer, trained on a small corpus and then made like one that is published."""
    pre = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    theirs.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()
    )
    theirs.train_from_iterator(CORPUS, trainer)
    FAMILIES[family](theirs)
    return theirs


@functools.cache
def ours(family, backend="auto", ignore_merges=False):
    return BPETokenizer.from_huggingface(built(family, ignore_merges), backend=backend)


ODD = (
    " ", "  ", "    ", "\n", "\t", "\u00a0", "\u3000", "e\u0301", "\u212b", "\ufb01", "1", "12345",
    "\u00b2", "\u0661\u0662", "a", "_", "!", "'ll", "A\u030a", "\u1100\u1161\u11a8", "\u0897",
    "q\u0323\u0307",
)  # fmt: skip
pieces = st.sampled_from((*MARKED, *ODD))
texts = st.lists(st.one_of(pieces, pieces, st.text(max_size=4)), max_size=12).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_ids_are_theirs(family, text):
    theirs, mine = built(family), ours(family)
    for add in (False, True):
        expected = theirs.encode(text, add_special_tokens=add).ids
        assert mine.encode(text, add_special_tokens=add) == expected
        assert mine.count(text, add_special_tokens=add) == len(expected)
        assert mine.encode_numpy(text, add_special_tokens=add).tolist() == expected
    assert mine.encode(text.encode()) == expected
    assert ours(family, "reference").encode(text) == expected
    if family == "every_flag":
        return  # theirs takes the \u00e9 of an added token for the byte 0xE9 when decoding
    assert mine.decode(expected) == theirs.decode(expected, skip_special_tokens=False)
    kept = mine.decode(expected, skip_special_tokens=True)
    assert kept == theirs.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, tmp_path):
    theirs, mine = built(family), ours(family)
    back = mine.to_huggingface()
    assert BPETokenizer.from_huggingface(back) == mine
    mine.save(tmp_path / "t.json")
    assert BPETokenizer.load(tmp_path / "t.json") == mine == pickle.loads(pickle.dumps(mine))
    there, here = json.loads(theirs.to_str()), json.loads(back.to_str())
    assert here["post_processor"] == there["post_processor"]
    assert here["added_tokens"] == there["added_tokens"]
    if family != "deepseek":  # an empty Sequence is written as none
        assert here["normalizer"] == there["normalizer"]
    for a, b in itertools.pairwise((*MARKED, "  x", "1234 5")):
        text = f"{a}{b} {a}  {b}1"
        for add in (False, True):
            assert (
                back.encode(text, add_special_tokens=add).ids
                == theirs.encode(text, add_special_tokens=add).ids
            )
        pairs = [t.encode(a, b) for t in (back, theirs)]
        assert pairs[0].ids == pairs[1].ids
        assert pairs[0].type_ids == pairs[1].type_ids
        assert (
            mine.model.template.join(
                mine.encode(a, add_special_tokens=False), mine.encode(b, add_special_tokens=False)
            )
            == pairs[1].ids
        )


@pytest.mark.parametrize("family", ["llama3", "gpt_neox", "every_flag", "starcoder", "roberta"])
def test_batches_offsets_truncation_and_appending(family):
    theirs, mine = built(family), ours(family)
    batch = [f"{a} {b}x  {a}" for a, b in itertools.product(MARKED[:10], MARKED[5:12])]
    expected = [theirs.encode(text).ids for text in batch]
    rows = mine.encode_batch(batch, threads=2)
    assert [row.tolist() for row in rows] == expected
    flat, offsets = mine.encode_batch(batch, flat=True, add_special_tokens=False)
    for i, text in enumerate(batch):
        alone = mine.encode(text, add_special_tokens=False)
        assert flat[offsets[i] : offsets[i + 1]].tolist() == alone
        ids, spans = mine.offsets(text)
        assert ids == expected[i]
        added = mine.model.template
        inner = spans[len(added.before) : len(spans) - len(added.after)]
        assert len(spans) == len(ids)
        assert "".join(text[a:b] for a, b in dict.fromkeys(inner)) == text
        appender = mine.appender()
        for c in text:
            appender.append(c)
        assert appender.ids() == alone
        assert len(appender) == len(alone)
        for most in (0, 1, len(alone) // 2, len(alone)):
            head = mine.truncate(text, most)
            kept = mine.encode(head, add_special_tokens=False)
            assert len(kept) <= most
            assert text.startswith(head)
            assert (head == text) == (len(alone) <= most)


def test_a_token_of_a_whole_piece():
    theirs, mine = built("llama3", True), ours("llama3", ignore_merges=True)
    assert mine.model.whole_piece
    for text in CORPUS:
        assert mine.encode(text) == theirs.encode(text).ids


def test_spans_of_normalized_text():
    mine = ours("gpt_neox")
    text = "cafe\u0301  \u212b x"
    ids, spans = mine.offsets(text)
    assert ids == built("gpt_neox").encode(text).ids
    assert spans[-1] == (9, 10) or spans[-1][1] == len(text)
    assert {text[a:b] for a, b in spans} & {"e\u0301", "fe\u0301", "afe\u0301", "cafe\u0301"}
    assert "  " in {text[a:b] for a, b in spans}


def test_ordinary_added_tokens_are_always_matched():
    mine = ours("qwen2")
    call, end = mine.token_to_id("<tool_call>"), mine.token_to_id("<|im_end|>")
    assert mine.encode("<tool_call>", allowed_special=()) == [call]
    with pytest.raises(ValueError, match="im_end"):
        mine.encode("<tool_call><|im_end|>", allowed_special=())
    assert mine.encode("<tool_call><|im_end|>", allowed_special="all") == [call, end]
    assert end not in mine.encode("<tool_call><|im_end|>", disallowed_special=())
    assert mine.decode([call, end], skip_special_tokens=True) == "<tool_call>"
    assert mine.decode(np.array([call, end]), skip_special_tokens=True) == "<tool_call>"


@pytest.mark.parametrize("form", FORMS)
def test_normalization_of_every_character(form):
    theirs = getattr(tokenizers.normalizers, form)()
    # Between a mark of class 220 and one of 240, beside which marks of any other class move.
    for start in range(0, 0x30000, 0x800):
        if 0xD800 <= start < 0xE000:
            continue
        for frame in ("{}x", "a\u0316{}x", "a\u0345{}x"):
            text = "".join(frame.format(chr(c)) for c in range(start, start + 0x800))
            assert normalize(text, (form,)) == theirs.normalize_str(text)


letters = st.characters(min_codepoint=0xC0, max_codepoint=0x1FFFF, exclude_categories=("Cs",))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=letters), st.sampled_from(FORMS))
def test_normalization_in_parts(text, form):
    normal, places = normalize_with_places(text, (form,))
    assert normal == normalize(text, (form,))
    assert len(places) == len(normal)
    assert is_normal(normal, (form,)) or normal != unicodedata.normalize(form, normal)
    covered = "".join(text[a:b] for a, b in dict.fromkeys(places))
    assert covered == text


def steps_of(d):
    return d["pre_tokenizer"]["pretokenizers"]


def processors_of(d):
    return d["post_processor"]["processors"]


BEGIN = "<|begin_of_text|>"
BERT = {"type": "BertProcessing", "cls": ["a", 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
        (lambda d: steps_of(d).reverse(), "'ByteLevel'.* is not supported before ByteLevel"),
        (lambda d: steps_of(d).pop(), "Split is not supported, it must end with ByteLevel"),
        (lambda d: steps_of(d)[0].update(behavior="MergedWithNext"), "this Split has no"),
        (lambda d: steps_of(d)[0].update(type="Whitespace"), "'Whitespace'"),
        (lambda d: steps_of(d)[1].update(add_prefix_space=True), "add_prefix_space"),
        (lambda d: d.update(decoder={"type": "WordPiece"}), "the decoder WordPiece"),
        (lambda d: processors_of(d).append({"type": "X"}), "the post_processor X"),
        (lambda d: processors_of(d).append(processors_of(d)[1]), "in two steps"),
        (lambda d: d["post_processor"].pop("processors"), "Sequence has no processors"),
        (lambda d: processors_of(d)[1].pop("pair"), "pair must be a list"),
        (lambda d: processors_of(d)[1].update(single=[]), "single must hold A once"),
        (lambda d: processors_of(d)[1].update(single=[3]), "single holds 3"),
        (lambda d: processors_of(d)[1]["special_tokens"].clear(), "needs the ids of '<.begin"),
        (
            lambda d: processors_of(d)[1]["special_tokens"][BEGIN].update(ids=[10**6]),
            "adds the id 1000000",
        ),
        (lambda d: d.update(post_processor=BERT), "BertProcessing: sep must be"),
    ],
)
def test_parts_without_a_counterpart_are_named(change, message):
    document = json.loads(built("llama3").to_str())
    change(document)
    with pytest.raises(ValueError, match=rf"tokenizer.json: .*{message}"):
        BPETokenizer.from_huggingface(json.dumps(document))
