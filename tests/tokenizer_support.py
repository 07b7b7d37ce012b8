"""What the tokenizer tests share: data, odd texts, and the two engines."""

from __future__ import annotations

import functools
import os
import random
import sys
import unicodedata
from pathlib import Path

import pytest

from lmfast.tokenizer import BPETokenizer
from lmfast.tokenizer.backend import missing_reason

DATA = Path(
    os.environ.get("LMFAST_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data")
)
ENGINES = ["reference"] if missing_reason else ["cpu", "reference"]
needs_engine = pytest.mark.skipif(missing_reason is not None, reason=f"no engine: {missing_reason}")


def data_file(name: str) -> Path:
    """A file of the shared data folder, or a skip that says it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set LMFAST_TEST_DATA to the folder that has it")
    return path


@functools.lru_cache(maxsize=2)
def gpt2(backend: str = "auto") -> BPETokenizer:
    """GPT-2's tokenizer."""
    return BPETokenizer.from_gpt2(
        data_file("gpt2.encoder.json"), data_file("gpt2.vocab.bpe"), backend=backend
    )


def corpus(name: str = "wikitext2.valid.txt") -> str:
    return data_file(name).read_text(encoding="utf-8")


# Where the rules of the patterns meet: contractions, spaces of all kinds, marks, digits, symbols,
# joined emoji, case that folds, invalid and unassigned characters, line ends.
ODD_TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    " \n ",
    "a",
    " a",
    "a ",
    "a  ",
    "a\n",
    "a \n\n b",
    "\r\n\r\n x\r",
    "\t\tif x:\n\t\t\treturn  1\n",
    "it's I'll we've you're I'd I'm don't 'tis 's'foo ''s' 'S 'LL 'Ve 'ſ x'ſx '",
    "a 's 't'll'll'l 'llx 'rex're'",
    "12345678 1 22 333 4444 x5y66z ½ Ⅷ ٣٤٥٦ ²³",
    "!!! ... ?!a !a  !a\t!a /// //\n/ !\n\n\n  b !\r\n/x",
    "naïve café ÅÄÖ ñandú cafe\u0301 \u0301 \u0301a a\u0301\u0302B \u0301AB",
    "HelloWorld HTTPServer iPhone ǅabc ABCdefGHI ʰʱ ªº Ⅰab",
    "漢字かな交じり文、テスト。한국어 ไทย हिन्दी தமிழ் العربية עברית",
    "A漢B 漢A a漢 漢'S don漢't",
    "😀😃 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \U0001d518\U0001d52b \U000e0041 \U0010ffff",
    "a\u00a0b \u00a0 c\u3000\u3000d \u2003e\u2028f\u2029 \u0085g \u1680 \u202f\u205f",
    "\u200b\ufeff\u180e \x1c\x1d\x1e\x1f \x00\x01 \x7f",
    "\u0378 \ue000 \uffff",
    "x" * 15 + " " + "y" * 16 + " " + "z" * 31 + " " + "w" * 32 + " " + "v" * 100,
    "ab" * 40 + "é" * 20 + "漢" * 12,
    " " * 100 + "x" + "\n" * 70 + " " * 65 + "y" + "\t" * 64,
    "a" * 4090 + " bcd " + "'re" * 5 + "e" * 5000 + "\n\n  end",
]


def every_category(each: int = 12) -> str:
    """Characters of every general category but surrogates, each between characters of other
    kinds."""
    draw = random.Random(8)
    points: dict[str, list[int]] = {}
    for code in range(sys.maxunicode + 1):
        points.setdefault(unicodedata.category(chr(code)), []).append(code)
    del points["Cs"]
    codes = [c for some in points.values() for c in draw.sample(some, min(each, len(some)))]
    return "".join(draw.choice(" a1\n!'A") + chr(c) * draw.randint(1, 2) for c in codes)
