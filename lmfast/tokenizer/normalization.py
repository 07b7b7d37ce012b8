"""Unicode normalization of a text before it is split, as files of Hugging Face ask for it."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, cast

FORMS = ("NFC", "NFD", "NFKC", "NFKD")

# tokenizers 0.23 normalizes by Unicode 9: these came later, and Python's newer tables would move or
# change them. They are neither: text on both sides of one is normalized by itself.
_NEWER = (
    "58B-58C 5C8-5C9 7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA "
    "209D-209F 32FF A7F1-A7F4 A82C AB69 105C9 105E4 10781-10785 10787-107B0 107B2-107BF "
    "10D24-10D27 10D69-10D6D 10EAB-10EAC 10ECB-10ECF 10EF0-10EFB 10EFD-10EFF 10F46-10F50 "
    "10F82-10F85 11070 1133B 11383 11385 1138E 11391 113B8 113BB 113C2 113C5 113C7-113C9 "
    "113CE-113D0 1145E 11839-1183A 11930 11938 1193D-1193E 11943 119E0 11A34 11A47 11A99 "
    "11D42 11D44-11D45 11D97 11F41-11F42 1611E-16129 1612F 16D67-16D6A 16FF0-16FF1 "
    "1B123-1B126 1CCD6-1CCF9 1D127-1D128 1D250-1D252 1D25B-1D25C 1D25F 1D280-1D281 1D6A6 "
    "1DF95 1DFCD-1DFFF 1E030-1E06D 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF "
    "1E5EE-1E5EF 1E6E3 1E6E6 1E6EE-1E6EF 1E6F5 1F16C 1FBF0-1FBF9"
)


@functools.lru_cache(maxsize=1)
def _newer() -> re.Pattern[str]:
    ranges = (part.split("-") for part in _NEWER.split())
    inside = "".join(f"\\U{int(r[0], 16):08x}-\\U{int(r[-1], 16):08x}" for r in ranges)
    return re.compile(f"([{inside}]+)")


def is_normal(text: str, forms: Sequence[str]) -> bool:
    """Whether `normalize` would surely leave a text as it is."""
    return text.isascii() or all(unicodedata.is_normalized(cast(Any, form), text) for form in forms)


def normalize(text: str, forms: Sequence[str]) -> str:
    """The text in each form, one after the other."""
    for form in forms:
        if not unicodedata.is_normalized(cast(Any, form), text):
            # Every second part is characters that stay as they are.
            parts = _newer().split(text)
            parts[::2] = [unicodedata.normalize(cast(Any, form), part) for part in parts[::2]]
            text = "".join(parts)
    return text


@functools.lru_cache(maxsize=1)
def _joining() -> frozenset[str]:
    """Characters of combining class 0 that can become one with the character before."""
    second = set()
    for code in range(0xC0, 0x30000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and parts[0][0] != "<":
            second.add(chr(int(parts[1], 16)))
    return frozenset(second) | set(map(chr, (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))))


def _begins(char: str) -> bool:
    """Whether nothing that precedes a character takes part in its normalization."""
    first = unicodedata.normalize("NFKD", char)[0]
    return not any(unicodedata.combining(c) or c in _joining() for c in (char, first))


def normalize_with_places(text: str, forms: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The normalized text, and for each of its characters the part of the text it came from."""
    parts: list[str] = []
    places: list[tuple[int, int]] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end < len(text) and not _begins(text[end]):
            continue
        parts.append(normalize(text[start:end], forms))
        places += [(start, end)] * len(parts[-1])
        start = end
    return "".join(parts), places
