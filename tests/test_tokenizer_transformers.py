"""LMFastTokenizer: padding, truncation, chat templates and files through transformers."""

from __future__ import annotations

import pickle

import pytest
from tokenizer_support import ODD_TEXTS, gpt2

from lmfast.tokenizer import BPETokenizer

pytest.importorskip("transformers")
from transformers import AddedToken

from lmfast.integrations.transformers_tokenizer import LMFastTokenizer

TEXTS = ["Hello there, world!", "a", "It isn't 漢字"]


def make(**options):
    return LMFastTokenizer(tokenizer=gpt2(), **options)


def test_ids_and_text():
    tokenizer = make()
    for text in ODD_TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == gpt2().encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]
    assert tokenizer.decode([64, 50256, 65], skip_special_tokens=True) == "ab"


def test_padding_and_truncation():
    tokenizer = make(pad_token="<|endoftext|>", padding_side="left")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    longest = max(len(gpt2().encode(text)) for text in TEXTS)
    assert batch["input_ids"].shape == (3, longest)
    assert batch["attention_mask"].sum(1).tolist() == [len(gpt2().encode(t)) for t in TEXTS]
    assert batch["input_ids"][1].tolist() == [50256] * (longest - 1) + gpt2().encode("a")
    cut = tokenizer(TEXTS, truncation=True, max_length=2)["input_ids"]
    assert cut == [gpt2().encode(text)[:2] for text in TEXTS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets(side):
    tokenizer = make(pad_token="<|endoftext|>", padding_side=side)
    tokenizer.add_tokens(["<new>"])
    texts = [*TEXTS, "a<new>b<|endoftext|> 漢", ""]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
    plain = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == plain["input_ids"].tolist()
    assert batch["attention_mask"].tolist() == plain["attention_mask"].tolist()
    assert batch["offset_mapping"].shape == (*batch["input_ids"].shape, 2)
    for text, spans, mask in zip(texts, batch["offset_mapping"], batch["attention_mask"]):
        at = 0
        for (start, end), real in zip(spans.tolist(), mask.tolist()):
            assert (start <= at <= end) if real else (start, end) == (0, 0)
            at = end if real else at
        assert at == len(text)
    cut = tokenizer("one two three", max_length=2, truncation=True, return_offsets_mapping=True)
    assert cut["offset_mapping"] == [(0, 3), (3, 7)]
    pair = tokenizer("one", " two", return_offsets_mapping=True)
    assert pair["offset_mapping"] == [(0, 3), (0, 4)]
    tokenizer.add_tokens([AddedToken("<s>", lstrip=True)])
    with pytest.raises(ValueError, match="strip"):
        tokenizer("a <s>", return_offsets_mapping=True)


def test_chat_template():
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    bpe = BPETokenizer.train(
        ["user assistant hello"] * 3, 300, special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer = LMFastTokenizer(tokenizer=bpe, chat_template=template)
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    assert ids == bpe.encode(text)
    assert ids.count(0) == 2
    batch = [messages, [{"role": "user", "content": "hello hello"}]]
    tokenizer.pad_token = "<|im_end|>"
    out = tokenizer.apply_chat_template(batch, padding=True, return_tensors="pt", return_dict=True)
    lengths = [len(bpe.encode(tokenizer.apply_chat_template(m, tokenize=False))) for m in batch]
    assert out["attention_mask"].sum(1).tolist() == lengths


@pytest.mark.parametrize("mode", ["byte", "char"])
def test_files(tmp_path, mode):
    specials = ["<pad>", "<unk>", "<bos>", "<eos>", "<extra>"]
    bpe = BPETokenizer.train(["low lower lowest"], 280, mode=mode, special_tokens=specials)
    tokenizer = LMFastTokenizer(tokenizer=bpe)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (bpe.pad_id, bpe.eos_id)
    tokenizer.save_pretrained(tmp_path)
    loaded = LMFastTokenizer.from_pretrained(tmp_path)
    assert loaded.bpe == bpe
    assert pickle.loads(pickle.dumps(loaded)).bpe == bpe
    for text in ("lower low", "lowest <extra> low<eos>"):
        assert loaded(text)["input_ids"] == bpe.encode(text)
        assert loaded.decode(loaded(text)["input_ids"]) == bpe.decode(bpe.encode(text))
    assert loaded.get_vocab()["<extra>"] == 4
    with pytest.raises(TypeError, match="either vocab_file or tokenizer"):
        LMFastTokenizer()


def test_added_tokens():
    tokenizer = make()
    assert tokenizer.add_tokens(["<new>"]) == 1
    ids = tokenizer("a<new>b")["input_ids"]
    assert ids == [64, 50257, 65]
    assert tokenizer.decode(ids) == "a<new>b"
