"""Matching of special and other added tokens, by the rules of Hugging Face's tokenizers.

Most tokenizers need only the engine's matcher: leftmost first, the longest at one place. What is
here covers the rest: tokens that take the whitespace beside them or stand only for whole words, two
groups of tokens that are matched before and after normalization, and normalization itself.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from .normalization import is_normal, normalize, normalize_with_places
from .unicode_classes import NEWLINE, SPACE, class_ranges

# What a token may be, beside a special token that is matched as it stands. "ordinary": it is text
# like any other when decoding, and always matched. "normalized": it is looked for in the normalized
# text, after the others. "lstrip", "rstrip": it takes the whitespace before or after it.
# "single_word": it is matched only where no letter or digit touches it.
FLAGS = ("ordinary", "normalized", "lstrip", "rstrip", "single_word")
_CONTEXT = frozenset(("lstrip", "rstrip", "single_word"))
_WORD = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"))
# Circled and squared letters are alphabetic without being letters; joiners are part of words.
_ALSO_WORD = ((0x200C, 0x200D), (0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169)) + (
    (0x1F170, 0x1F189),
)
Flags = Mapping[str, Collection[str]]


def _is_word(char: str) -> bool:
    r"""`\w` of the regular expressions of Rust."""
    return unicodedata.category(char) in _WORD or any(a <= ord(char) <= b for a, b in _ALSO_WORD)


class Part(NamedTuple):
    """A piece of a text between tokens, or a token: then with its id."""

    text: str  # normalized
    id: int | None
    places: list[tuple[int, int]]  # per character of `text`, where it was; empty unless asked for


class _Group:
    """Tokens that are looked for at the same time."""

    def __init__(self, tokens: Mapping[str, int], flags: Flags) -> None:
        self._tokens, self._flags = tokens, flags
        longest_first = sorted(tokens, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first))) if tokens else None
        blank = class_ranges(SPACE, NEWLINE)
        self._before = re.compile(rf"[{blank}]*\Z")
        self._after = re.compile(rf"[{blank}]*")

    def split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """(start, end, id or None) of text and tokens in turn; begins and ends with text."""
        position = 0
        for match in self._find.finditer(text) if self._find else ():
            start, stop = match.span()
            flags = self._flags.get(match.group(), ())
            if "single_word" in flags and (
                (start > 0 and _is_word(text[start - 1]))
                or (stop < len(text) and _is_word(text[stop]))
            ):
                continue
            if "lstrip" in flags:
                while start > position and self._after.fullmatch(text, start - 1, start):
                    start -= 1
            if "rstrip" in flags:
                stop = self._after.match(text, stop).end()  # type: ignore[union-attr]
            start = max(start, position)
            yield position, start, None
            yield start, stop, self._tokens[match.group()]
            position = stop
        yield position, len(text), None


class AddedTokens:
    """The tokens that are matched before splitting.

    Args:
        tokens: text -> id of those to match.
        flags: text -> some of `FLAGS`.
        forms: of normalization.
    """

    def __init__(self, tokens: Mapping[str, int], flags: Flags, forms: Sequence[str]) -> None:
        late = {t: id for t, id in tokens.items() if "normalized" in flags.get(t, ())}
        self._forms = forms
        self._first = _Group({t: id for t, id in tokens.items() if t not in late}, flags)
        self._second = _Group(
            {normalize(t, forms): id for t, id in late.items()},
            {normalize(t, forms): flags[t] for t in late},
        )

    def split(self, text: str, *, located: bool = False) -> Iterator[Part]:
        """Text and tokens in turn; begins and ends with text, which may be empty."""
        for start, end, id in self._first.split(text):
            raw = text[start:end]
            if id is not None:
                yield Part(raw, id, [(start, end)] * (len(raw) if located else 0))
                continue
            places: list[tuple[int, int]] = []
            if is_normal(raw, self._forms):
                normal = raw
                if located:
                    places = [(i, i + 1) for i in range(start, end)]
            elif located:
                normal, places = normalize_with_places(raw, self._forms)
                places = [(start + a, start + b) for a, b in places]
            else:
                normal = normalize(raw, self._forms)
            for a, b, inner in self._second.split(normal):
                yield Part(normal[a:b], inner, places[a:b])


def is_plain(tokens: Collection[str], flags: Flags, forms: Sequence[str]) -> bool:
    """Whether one matcher, leftmost first and the longest at one place, finds the same tokens in
    every text that is normalized already."""
    if any(_CONTEXT.intersection(flags.get(token, ())) for token in tokens):
        return False
    late = {token for token in tokens if "normalized" in flags.get(token, ())}
    first = set(tokens) - late
    if not all(is_normal(token, forms) for token in late):
        return False
    return not (first and late and (_touch(first, late) or _touch(late, first)))


def _touch(some: set[str], others: set[str]) -> bool:
    """Whether a token holds one of the others, or ends with the beginning of one."""
    beginnings = {token[:n] for token in others for n in range(1, len(token) + 1)}
    for token in some:
        if any(token[i:] in beginnings for i in range(len(token))):
            return True
        if any(token[i:j] in others for i in range(len(token)) for j in range(i + 1, len(token))):
            return True
    return False
