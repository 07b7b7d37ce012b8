"""How text is cut into pieces before merging: named patterns, and any regular expression.

A named pattern has a hand-written scanner in the compiled engine and, here, a regular expression
of Python's ``re`` over the pinned Unicode table, which the fallback uses and the tests compare
against.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

from .unicode_classes import LETTER, LOWER, MARK, NEWLINE, NUMBER, SPACE, UPPER, class_ranges

# The order is the numbering of csrc/bpe/scanner.h.
SCANNERS = ("none", "words", "lines", "whitespace", "gpt2", "cl100k", "llama3", "o200k")

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# The published expression of each named pattern, as other tokenizers write it into their files.
PUBLISHED = {
    "whitespace": r"\S+|\s+",
    "gpt2": GPT2_PATTERN,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "llama3": _LLAMA3_PATTERN,
    "o200k": _O200K_PATTERN,
}
# Other spellings that match the same pieces.
_SPELLINGS = {
    **{pattern: name for name, pattern in PUBLISHED.items()},
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
}


Pattern = str | tuple[str, ...] | None


def canonical_pattern(pattern: Any) -> Pattern:
    """The name of a known pattern, or the regular expression itself, or None for no splitting, or
    several that are applied one after the other."""
    if isinstance(pattern, (tuple, list)):
        several = tuple(str(canonical_pattern(_not_none(part))) for part in pattern)
        return several if len(several) > 1 else several[0] if several else None
    if pattern is None or pattern in SCANNERS[1:]:
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a str or None, got {type(pattern).__name__}")
    if pattern in ("", SCANNERS[0]):
        raise ValueError(f"pattern must not be {pattern!r}; for no splitting it must be None")
    return _SPELLINGS.get(pattern, pattern)


def _not_none(pattern: Any) -> Any:
    if not isinstance(pattern, str):
        raise TypeError(f"several patterns must be str, got {pattern!r}")
    return pattern


def scanner_code(pattern: Pattern) -> int | None:
    """The engine's number of a named pattern; None for a regular expression and for several."""
    name = pattern or "none"
    return SCANNERS.index(name) if name in SCANNERS else None


def _expressions() -> dict[str, str]:
    letters = class_ranges(UPPER, LOWER, LETTER)
    numbers = class_ranges(NUMBER)
    spaces = class_ranges(SPACE, NEWLINE)
    upper = class_ranges(UPPER, LETTER, MARK)
    lower = class_ranges(LOWER, LETTER, MARK)
    # U+017F, the long s, folds to s: the expressions that ignore case accept it.
    suffix = "'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
    prefix = rf"[^\r\n{letters}{numbers}]?"
    tail = rf"[{spaces}]+(?![^{spaces}])|[{spaces}]+"
    newline_tail = rf"[{spaces}]*[\r\n]|{tail}"
    cl100k = (
        rf"{suffix}|{prefix}[{letters}]+|[{numbers}]{{1,3}}| ?[^{spaces}{letters}{numbers}]+[\r\n]*"
    )
    return {
        "words": rf"[^{spaces}\x1c-\x1f]+",
        "lines": r"[^\r\n]+",
        "whitespace": rf"[^{spaces}]+|[{spaces}]+",
        "gpt2": rf"'(?:[sdmt]|ll|ve|re)| ?[{letters}]+| ?[{numbers}]+"
        rf"| ?[^{spaces}{letters}{numbers}]+|{tail}",
        "cl100k": rf"{cl100k}|[{spaces}]+\Z|{newline_tail}",
        "llama3": rf"{cl100k}|{newline_tail}",
        "o200k": rf"{prefix}[{upper}]*[{lower}]+(?:{suffix})?|{prefix}[{upper}]+[{lower}]*"
        rf"(?:{suffix})?|[{numbers}]{{1,3}}| ?[^{spaces}{letters}{numbers}]+[\r\n/]*"
        rf"|{newline_tail}",
    }


@functools.lru_cache(maxsize=16)
def named_expression(pattern: str) -> re.Pattern[str]:
    """The expression of a named pattern over the pinned Unicode table."""
    return re.compile(_expressions()[pattern])


@functools.lru_cache(maxsize=64)
def splitter(pattern: Pattern) -> Callable[[str], Iterable[str]]:
    """A function from a text to its pieces, in order.

    Every pattern but "words" and "lines" keeps all of the text: what a regular expression leaves
    unmatched becomes a piece of its own.
    """
    if pattern is None:
        return lambda text: [text] if text else []
    if isinstance(pattern, tuple):
        first, *others = map(splitter, pattern)

        def split_again(text: str) -> Iterable[str]:
            pieces = first(text)
            for other in others:
                pieces = itertools.chain.from_iterable(map(other, pieces))
            return pieces

        return split_again
    if pattern in SCANNERS:
        return named_expression(pattern).findall
    expression = compile_pattern(pattern)

    def split(text: str) -> Iterable[str]:
        position = 0
        for match in expression.finditer(text):
            start, stop = match.span()
            if start > position:
                yield text[position:start]
            if stop > start:
                yield text[start:stop]
            position = stop
        if position < len(text):
            yield text[position:]

    return split


def compile_pattern(pattern: str):
    """Compile a user's regular expression with the ``regex`` package."""
    try:
        import regex
    except ImportError as error:
        raise ImportError(
            f"the pattern {pattern!r} is none of {', '.join(SCANNERS[1:])}; any other regular "
            "expression needs the `regex` package: pip install regex"
        ) from error
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
