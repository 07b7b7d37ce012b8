"""What training and counting accept: errors that name the argument, what it was and must be."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from .model import MODES
from .patterns import Pattern, canonical_pattern
from .reference import TIE_BREAKS, sound_text, to_bytes


class TrainingOptions(TypedDict, total=False):
    """The keywords of `BPETokenizer.train`, for type checkers."""

    mode: str
    pattern: str | None
    special_tokens: Sequence[str] | None
    min_frequency: int
    max_token_length: int | None
    tie_break: str
    marker: str
    unk_token: str
    threads: int | None
    progress: Callable[[int, int], None] | None
    backend: str


MOST_IDS = (1 << 21) - 1


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer of any integer type, within bounds."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def is_one(vocab_size: Any) -> bool:
    """Whether one size is asked for, not a sequence of sizes."""
    return hasattr(vocab_size, "__index__")


def checked_sizes(vocab_size: Any) -> list[int]:
    if not is_one(vocab_size) and (
        isinstance(vocab_size, (str, bytes)) or not isinstance(vocab_size, Sequence)
    ):
        raise TypeError(f"vocab_size must be an int or a sequence of ints, got {vocab_size!r}")
    sizes = [vocab_size] if is_one(vocab_size) else list(vocab_size)
    if not sizes:
        raise ValueError(f"vocab_size must hold a size, got {vocab_size!r}")
    return [whole("vocab_size", size, 1, MOST_IDS) for size in sizes]


def checked_threads(threads: Any) -> int | None:
    return None if threads is None else min(whole("threads", threads, 1), 1024)


def checked_pattern(mode: Any, pattern: Any) -> Pattern:
    """The pattern of a mode: "default" is GPT-2's for bytes and words for characters."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if pattern == "default":
        return "gpt2" if mode == "byte" else "words"
    pattern = canonical_pattern(pattern)
    if mode == "char" and pattern not in ("words", "lines"):
        raise ValueError(f'pattern must be "words" or "lines" in the char mode, got {pattern!r}')
    if mode == "byte" and pattern in ("words", "lines"):
        raise ValueError(f"pattern {pattern!r} drops text and is for the char mode only")
    return pattern


def checked_rules(
    tie_break: Any, min_frequency: Any, max_token_length: Any, progress: Any
) -> tuple[int, int, int]:
    """Number of the tie break, least count, and length limit (0: none)."""
    if tie_break not in TIE_BREAKS:
        raise ValueError(f"tie_break must be one of {TIE_BREAKS}, got {tie_break!r}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable or None, got {type(progress).__name__}")
    least = whole("min_frequency", min_frequency, 0, (1 << 63) - 1)
    # No token is longer than the corpus, which has 32-bit positions.
    longest = 0 if max_token_length is None else whole("max_token_length", max_token_length, 1)
    return TIE_BREAKS.index(tie_break), least, min(longest, (1 << 32) - 1)


def checked_specials(
    special_tokens: Sequence[str], mode: str, marker: Any, unk_token: Any
) -> dict[str, int]:
    """Special token -> id, in order, without repetitions."""
    if isinstance(special_tokens, (str, bytes)) or not isinstance(special_tokens, Sequence):
        raise TypeError(
            f"special_tokens must be a sequence of str, got {type(special_tokens).__name__}"
        )
    for token in special_tokens:
        if not isinstance(token, str):
            raise TypeError(f"special_tokens must hold str, got {token!r}")
        if not token or not _is_text(token):
            raise ValueError(f"a special token must not be empty or hold surrogates, got {token!r}")
    specials = {text: id for id, text in enumerate(dict.fromkeys(special_tokens))}
    if mode == "char":
        if not isinstance(marker, str):
            raise TypeError(f"marker must be a str, got {type(marker).__name__}")
        if len(marker) != 1 or marker.isspace() or not _is_text(marker):
            raise ValueError(f"marker must be one character that is not a space, got {marker!r}")
        if unk_token not in specials:
            raise ValueError(f"special_tokens must hold the unk_token {unk_token!r}")
    return specials


def checked_counts(
    words: Mapping[Any, Any], mode: str, pattern: Pattern
) -> tuple[list[bytes], list[int]]:
    """The words of a mapping as bytes, and their counts; pair counts must fit 64 bits."""
    made = (getattr(words, "mode", mode), getattr(words, "pattern", pattern))
    if made != (mode, pattern):
        raise ValueError(
            f"the counts are of mode {made[0]!r}, pattern {made[1]!r}; "
            f"training asks for mode {mode!r}, pattern {pattern!r}"
        )
    texts, counts, total = [], [], 0
    for word, count in words.items():
        if not isinstance(word, (str, bytes)):
            raise TypeError(f"corpus must map str or bytes to counts, got the word {word!r}")
        texts.append(word if isinstance(word, bytes) else to_bytes(sound_text(word)))
        counts.append(whole(f"the count of {word!r}", count, 0))
        total += counts[-1] * len(texts[-1])
    if total >= 1 << 63:
        raise ValueError(f"the counts of all symbols must add up to less than 2**63, got {total}")
    return texts, counts


def _is_text(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
