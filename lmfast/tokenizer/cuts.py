"""Where a text can be cut in two without changing its pieces, so that it can be read in parts."""

from __future__ import annotations

import functools
from collections.abc import Collection

import numpy as np

from .patterns import Pattern
from .unicode_classes import (
    LETTER,
    LOWER,
    MARK,
    NEWLINE,
    NUMBER,
    OTHER,
    SPACE,
    UPPER,
    class_table,
)

_Rule = list[tuple[tuple[int, ...], tuple[int, ...]]]

# Characters of class OTHER with rules of their own. A surrogate may be half of a character, or a
# byte that is not UTF-8: next to one there is no cut.
_APOSTROPHE, _SLASH, _SURROGATE = range(8, 11)
_WORD = (UPPER, LOWER, LETTER, NUMBER)
_BLANK = (SPACE, NEWLINE)
_SOLID = (*_WORD, MARK, OTHER, _APOSTROPHE, _SLASH)

# For each pattern the classes (before, after) between which a piece always ends, and before which
# no expression looks ahead. Cutting before whitespace keeps `\s+(?!\S)` from seeing an end of text
# that is not one. In all but gpt2 line ends join the symbols before them, but never what follows;
# in o200k a slash joins them, and an apostrophe may join a word.
_WORD_ENDS: _Rule = [(_WORD, (OTHER, _SLASH, *_BLANK))]
_LINE_ENDS: _Rule = [
    *_WORD_ENDS,
    (_SOLID, (SPACE,)),
    ((NEWLINE,), (*_WORD, MARK, OTHER, _APOSTROPHE)),
]
_RULES: dict[str, _Rule] = {
    "words": [((*_SOLID, *_BLANK), _BLANK)],
    "lines": [((*_SOLID, *_BLANK), (NEWLINE,))],
    "whitespace": [(_SOLID, _BLANK), (_BLANK, _SOLID)],
    "gpt2": [*_WORD_ENDS, (_SOLID, _BLANK)],
    "cl100k": _LINE_ENDS,
    "llama3": _LINE_ENDS,
    "o200k": _LINE_ENDS,
}


@functools.lru_cache(maxsize=1)
def _classes() -> np.ndarray:
    table = np.frombuffer(class_table(), dtype=np.uint8).copy()
    table[ord("'")], table[ord("/")] = _APOSTROPHE, _SLASH
    table[0xD800:0xE000] = _SURROGATE
    return table


@functools.lru_cache(maxsize=16)
def _ends(pattern: str) -> np.ndarray:
    """Whether a piece ends between two classes, as a table [before, after]."""
    table = np.zeros((_SURROGATE + 1, _SURROGATE + 1), dtype=bool)
    for before, after in _RULES[pattern]:
        table[np.ix_(before, after)] = True
    return table


def safe_cut(text: str, pattern: Pattern, joined: Collection[str] = ()) -> int:
    """The last place inside a text where a piece ends whatever precedes and follows the text.

    Args:
        text: the text, or a part of it.
        pattern: a named pattern; for any other nothing is certain before the end of the text.
        joined: pairs of characters between which no cut may be, see `pairs_inside`.

    Returns:
        The number of characters before the cut; 0 where there is none.
    """
    if not isinstance(pattern, str) or pattern not in _RULES or len(text) < 2:
        return 0
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    classes = _classes()[codes]
    places = np.flatnonzero(_ends(pattern)[classes[:-1], classes[1:]])
    for place in reversed(places):
        if text[place : place + 2] not in joined:
            return int(place) + 1
    return 0


def safe_cut_bytes(text: bytes, pattern: Pattern, tail: int) -> int:
    """As `safe_cut`, for UTF-8 that may begin and end inside a character.

    The last ``tail`` bytes are searched first: mostly they hold a cut.
    """
    if pattern not in _RULES:
        return 0
    for start in {max(0, len(text) - tail): None, 0: None}:
        while start < len(text) and text[start] & 0xC0 == 0x80:
            start += 1
        decoded = text[start:].decode("utf-8", "surrogateescape")
        cut = safe_cut(decoded, pattern)
        if cut:
            return start + len(decoded[:cut].encode("utf-8", "surrogateescape"))
    return 0


def pairs_inside(tokens: Collection[str]) -> frozenset[str]:
    """The neighbouring characters of special tokens: a cut between two could split a token."""
    return frozenset(token[i : i + 2] for token in tokens for i in range(len(token) - 1))
