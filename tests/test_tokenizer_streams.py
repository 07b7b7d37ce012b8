"""Texts that are read in parts give the pieces of the whole, in every script, in bounded blocks."""

from __future__ import annotations

import random

import pytest
from tokenizer_support import ENGINES, ODD_TEXTS, every_category

from lmfast.tokenizer import BPETokenizer, count_words, training
from lmfast.tokenizer.cuts import safe_cut, safe_cut_bytes
from lmfast.tokenizer.patterns import SCANNERS, named_expression

NAMED = SCANNERS[1:]
SCRIPTS = {
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.\n",
    "japanese": "いろはにほへとちりぬるを。わかよたれそつねならむ\n",
    "no line ends": "色は匂へど、散りぬるを。我が世誰ぞ、常ならむ。",
    "punctuation": "!?,.;:\n",
    "symbols": "!!! ... ??? ",
}


def random_text(draw: random.Random, characters: str) -> str:
    short = " \n\r\t\u3000'/!.aA1éЖ漢\u0301sl\U0001d518\ud83d\ude00"
    return "".join(
        draw.choice(short if draw.random() < 0.8 else characters)
        for _ in range(draw.randint(2, 24))
    )


@pytest.mark.parametrize("pattern", NAMED)
def test_cut_texts_have_the_pieces_of_the_whole(pattern):
    pieces = named_expression(pattern).findall
    draw, characters = random.Random(11), every_category(4)
    texts = [random_text(draw, characters) for _ in range(4000)] + ODD_TEXTS
    found = 0
    for text in texts:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for end in range(2, len(text) + 1) if len(text) < 30 else [len(text)]:
            cut = safe_cut(text[:end], pattern)
            found += cut > 0
            assert not cut or pieces(text[:cut]) + pieces(text[cut:]) == pieces(text)
    assert found > 10_000


@pytest.mark.parametrize("pattern", NAMED)
def test_cuts_of_bytes_lie_between_characters(pattern):
    raw = ("漢字 é!\n" * 3).encode()
    for start in range(12):
        for end in range(start, len(raw) + 1):
            cut = safe_cut_bytes(raw[start:end], pattern, 5)
            assert not cut or raw[start + cut] & 0xC0 != 0x80


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "words"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_files_are_read_in_bounded_blocks(tmp_path, monkeypatch, script, pattern):
    if (script, pattern) == ("no line ends", "words"):
        pytest.skip("the text is a single word")
    monkeypatch.setattr(training, "_BLOCK", 1000)
    monkeypatch.setattr(training, "_TAIL", 100)
    raw = (SCRIPTS[script] * 2000).encode()[:50_000]
    path = tmp_path / "text"
    path.write_bytes(raw)
    blocks = list(training._file_blocks(path, pattern))
    assert b"".join(blocks) == raw
    assert len(blocks) >= len(raw) // 1000
    assert max(map(len, blocks)) < 2000
    mode = "char" if pattern == "words" else "byte"
    assert count_words(path, mode=mode, pattern=pattern) == count_words(
        raw, mode=mode, pattern=pattern
    )


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
def test_files_that_are_not_utf8(tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(training, "_BLOCK", 64)
    draw = random.Random(3)
    raw = b"".join(draw.choice([b" ", b"\n", b"a", b"\xe9", b"\xff!", "漢".encode()]) * 2
                   for _ in range(3000))  # fmt: skip
    path = tmp_path / "text"
    path.write_bytes(raw)
    for backend in ENGINES:
        options = {"pattern": pattern, "backend": backend}
        assert count_words(path, **options) == count_words(raw, **options)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_appending_encodes_every_character_about_once(monkeypatch, script, pattern):
    specials = ["<|end|>", "<a b>"]
    tokenizer = BPETokenizer.train([SCRIPTS[script]], 270, pattern=pattern, special_tokens=specials)
    text = (SCRIPTS[script] * 6 + "<a b>x<|end|>") * 8
    encoded = []

    class Watched(BPETokenizer):
        def encode(self, text, **options):
            encoded.append(len(text))
            return super().encode(text, **options)

    appender = Watched(tokenizer.model).appender()
    for at in range(0, len(text), 3):
        appender.append(text[at : at + 3])
    assert sum(encoded) <= len(text)
    encoded.clear()
    assert appender.ids() == tokenizer.encode(text)
    assert encoded[0] < 100
