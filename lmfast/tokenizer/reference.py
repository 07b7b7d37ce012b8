"""Byte-pair encoding as the textbooks write it: short, slow, and the measure of the fast engine.

It is also what runs when the compiled engine is absent, so every class here has the interface of
its compiled twin in ``lmfast._bpe`` and gives the same answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .dropout import Random, merge_with_dropout
from .patterns import SCANNERS, splitter

Symbol = bytes
Word = tuple[Symbol, ...]


def pair_counts(words: Mapping[Word, int]) -> dict[tuple[Symbol, Symbol], int]:
    """Occurrences of every adjacent pair, overlapping ones too, weighted by the word's count."""
    counts: dict[tuple[Symbol, Symbol], int] = {}
    for word, weight in words.items():
        for pair in pairwise(word):
            counts[pair] = counts.get(pair, 0) + weight
    return counts


def merge_word(word: Sequence[Symbol], pair: tuple[Symbol, Symbol]) -> Word:
    """Join the pair in one word, from left to right, without overlap."""
    out: list[Symbol] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def learn_merges(
    words: Mapping[Word, int],
    size: int,
    *,
    tie_break: str = "first",
    min_count: int = 1,
    max_length: int = 0,
    ids: Mapping[Symbol, int] | None = None,
    next_id: int = 0,
    on_merge: Callable[[int], None] | None = None,
) -> list[tuple[Symbol, Symbol, int]]:
    """Learn merges by recounting all pairs in every round.

    Args:
        words: distinct words as tuples of symbols, in order of first appearance, with counts.
        size: number of new tokens to stop at.
        tie_break: among equal counts "first" takes the pair met first, "ids" the smallest pair of
            ids, "lexicographic" the smallest pair of strings.
        min_count: stop when the best pair is rarer.
        max_length: leave out pairs that would make a token of as many symbols; 0: no limit. Pairs
            of two single symbols are always allowed.
        ids: ids of the symbols, and of strings that have an id already.
        next_id: the id of the first new token.
        on_merge: called with the number of merges now and then.

    Returns:
        (left, right, count) in order.
    """
    ids = dict(ids or {})
    lengths = {symbol: 1 for word in words for symbol in word}
    merges: list[tuple[Symbol, Symbol, int]] = []
    grown = 0
    while grown < size:
        counts = {
            pair: count
            for pair, count in pair_counts(words).items()
            if not max_length
            or (total := lengths[pair[0]] + lengths[pair[1]]) == 2
            or total < max_length
        }
        if not counts:
            break
        if tie_break == "first":
            best = max(counts, key=counts.__getitem__)
        elif tie_break == "ids":
            best = min(counts, key=lambda p: (-counts[p], ids[p[0]], ids[p[1]]))
        else:
            best = min(counts, key=lambda p: (-counts[p], p))
        if counts[best] < max(min_count, 1):
            break
        merges.append((*best, counts[best]))
        new = best[0] + best[1]
        lengths[new] = lengths[best[0]] + lengths[best[1]]
        if new not in ids:
            ids[new] = next_id + grown
            grown += 1
        merged: dict[Word, int] = {}
        for word, weight in words.items():
            word = merge_word(word, best)
            merged[word] = merged.get(word, 0) + weight
        words = merged
        if on_merge is not None:
            on_merge(len(merges))
    return merges


def apply_merges(
    symbols: Sequence[int], ranks: Mapping[tuple[int, int], tuple[int, int]]
) -> list[int]:
    """Merge the pair of lowest rank, leftmost first, until none applies.

    ``ranks`` maps a pair of ids to (rank, new id).
    """
    ids = list(symbols)
    absent = (float("inf"), -1)
    while len(ids) > 1:
        found = [ranks.get(pair, absent) for pair in pairwise(ids)]
        rank, new = min(found, key=lambda f: f[0])
        if new < 0:
            break
        i = next(i for i, f in enumerate(found) if f[0] == rank)
        ids[i : i + 2] = [new]
    return ids


def sound_text(text: str | bytes) -> str:
    """A str that can be encoded: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "surrogateescape")
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def valid_prefix(text: bytes) -> int:
    """How many bytes come before the first that is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(text)


def to_bytes(piece: str) -> bytes:
    """UTF-8 of a piece; bytes that were not UTF-8 come back as they were."""
    return piece.encode("utf-8", "surrogateescape")


class Specials:
    """The special tokens one call may match: leftmost first, the longest at one place."""

    def __init__(self, tokens: Sequence[tuple[bytes, int]]) -> None:
        self._ids = {text.decode(): id for text, id in tokens}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def split(self, text: str) -> Iterable[tuple[str, int | None]]:
        """(text between, None) and (special token, its id), in order."""
        position = 0
        for match in self._find.finditer(text) if self._find else ():
            yield text[position : match.start()], None
            yield match.group(), self._ids[match.group()]
            position = match.end()
        yield text[position:], None


class Encoder:
    """Text to ids; the arguments are those of the compiled engine."""

    def __init__(
        self,
        pattern: int,
        characters: bool,
        whole_piece: bool,
        marker: int,
        unk: int,
        tokens: Sequence[bytes],
        symbols: np.ndarray,
        merges: np.ndarray,
        specials: Specials,
    ) -> None:
        self._specials = specials
        self._split = splitter(SCANNERS[pattern] if pattern else None)
        self._characters, self._marker, self._unk = characters, marker, unk
        self._whole = {token: id for id, token in enumerate(tokens) if token} if whole_piece else {}
        flat = np.asarray(symbols).tolist()
        self._symbols = dict(zip(flat[::2], flat[1::2])) if characters else dict(enumerate(flat))
        self._ranks = {(a, b): (rank, new) for a, b, new, rank in np.asarray(merges).tolist()}
        self._cache: dict[str, list[int]] = {}

    def _piece(self, piece: str) -> list[int]:
        found = self._cache.get(piece)
        if found is None:
            found = self._merge_piece(piece)
            if len(self._cache) >= 1 << 16:
                self._cache.clear()
            self._cache[piece] = found
        return found

    def _merge_piece(self, piece: str) -> list[int]:
        raw = to_bytes(piece)
        if raw in self._whole:
            return [self._whole[raw]]
        return apply_merges(self._first_symbols(piece), self._ranks)

    def _first_symbols(self, piece: str) -> list[int]:
        if self._characters:
            return [self._marker, *(self._symbols.get(ord(c), self._unk) for c in piece)]
        return [self._symbols[b] for b in to_bytes(piece)]

    def encode_text(self, text: object) -> Any:
        """The ids of a str with all special tokens; NotImplemented for anything else."""
        return self.encode(text, self._specials) if isinstance(text, str) else NotImplemented

    def encode(
        self, text: str | bytes, specials: Specials, ends: np.ndarray | None = None
    ) -> list[int]:
        ids: list[int] = []
        for piece, special in self._pieces(text, specials, ends):
            if special is not None:
                ids.append(special)
            else:
                ids += self._piece(piece)
        return ids

    def _pieces(
        self, text: str | bytes, specials: Specials, ends: np.ndarray | None
    ) -> Iterable[tuple[str, int | None]]:
        """(piece, None) and (special token, its id), in order."""
        if ends is not None:
            raw = to_bytes(sound_text(text))
            for start, end in pairwise([0, *np.asarray(ends).tolist()]):
                if end > start:
                    yield raw[start:end].decode("utf-8", "surrogateescape"), None
            return
        for part, special in specials.split(sound_text(text)):
            if special is not None:
                yield part, special
                continue
            for piece in self._split(part):
                yield piece, None

    def encode_array(
        self, text: str | bytes, specials: Specials, ends: np.ndarray | None = None
    ) -> np.ndarray:
        return np.array(self.encode(text, specials, ends), dtype=np.int32)

    def count(self, text: str | bytes, specials: Specials) -> int:
        return len(self.encode(text, specials))

    def encode_dropout(
        self,
        text: str | bytes,
        specials: Specials,
        ends: np.ndarray | None,
        dropout: float,
        state: int,
    ) -> tuple[list[int], int]:
        """The ids with BPE-dropout, and the state of the random numbers afterwards."""
        draw = Random(state)
        ids: list[int] = []
        for piece, special in self._pieces(text, specials, ends):
            if special is not None:
                ids.append(special)
            else:
                ids += merge_with_dropout(self._first_symbols(piece), self._ranks, dropout, draw)
        return ids, draw.state

    def encode_batch(
        self, texts: Sequence[str | bytes], specials: Specials, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = [self.encode(text, specials) for text in texts]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.array([id for row in rows for id in row], dtype=np.int32), offsets


class Decoder:
    """Ids to bytes; the arguments are those of the compiled engine."""

    def __init__(self, bytes: Sequence[bytes], unknown: Sequence[bool]) -> None:
        self._bytes = list(bytes)
        self._unknown = list(unknown)

    def first_unknown(self, ids: Sequence[int]) -> int:
        for i, id in enumerate(ids):
            if not hasattr(id, "__index__"):
                raise TypeError(f"ids[{i}] must be an int, got {type(id).__name__}")
            if not 0 <= id < len(self._bytes) or self._unknown[id]:
                return i
        return -1

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        at = self.first_unknown(ids)
        if at >= 0:
            raise ValueError(f"ids[{at}] is {int(ids[at])}, which is not in the vocabulary")
        return b"".join(self._bytes[id] for id in ids)

    def decode(self, ids: Sequence[int], errors: str) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors)


class Counter:
    """Distinct pieces with counts, in order of first appearance."""

    def __init__(self, pattern: int) -> None:
        self._split = splitter(SCANNERS[pattern] if pattern else None)
        self._counts: dict[bytes, int] = {}

    def add_texts(self, texts: Sequence[object], threads: int, first: int = 0) -> int:
        """Count the texts from ``first`` on; returns where the first item is that is none."""
        for at in range(first, len(texts)):
            text = texts[at]
            if not isinstance(text, (str, bytes)):
                return at
            for piece in self._split(sound_text(text)):
                raw = to_bytes(piece)
                self._counts[raw] = self._counts.get(raw, 0) + 1
        return max(first, len(texts))

    def add_words(self, words: Sequence[bytes], counts: Sequence[int]) -> None:
        for word, count in zip(words, counts, strict=True):
            if word and count:
                self._counts[word] = self._counts.get(word, 0) + count

    def items(self) -> list[tuple[bytes, int]]:
        return list(self._counts.items())

    def __len__(self) -> int:
        return len(self._counts)


_INVALID = re.compile("[\udc80-\udcff]")
TIE_BREAKS = ("first", "ids", "lexicographic")


def learn(
    counter: Counter,
    byte_ids: Sequence[int] | None,
    marker: str,
    first_symbol_id: int,
    tie_break: int,
    vocabulary_left: int,
    min_frequency: int,
    max_token_length: int,
    first_new_id: int,
    taken: Mapping[bytes, int],
    progress: Callable[[int], None] | None,
) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Strings of the symbols and of what each merge makes, merges as (n, 2) indices of strings, and
    their counts."""
    words: dict[Word, int] = {}
    if byte_ids is None:
        for raw, count in counter.items():
            text = marker + _INVALID.sub("\ufffd", raw.decode("utf-8", "surrogateescape"))
            word = tuple(c.encode() for c in text)
            words[word] = words.get(word, 0) + count
        symbols = sorted({s for word in words for s in word} | {marker.encode()})
        ids = {s: first_symbol_id + i for i, s in enumerate(symbols)}
        vocabulary_left -= len(symbols)
    else:
        words = {tuple(bytes([b]) for b in raw): count for raw, count in counter.items()}
        symbols = [bytes([b]) for b in range(256)]
        ids = dict(zip(symbols, byte_ids))
    next_id = first_new_id if first_new_id >= 0 else first_symbol_id + len(symbols)
    ids.update(taken)
    merges = learn_merges(
        words,
        max(vocabulary_left, 0),
        tie_break=TIE_BREAKS[tie_break],
        min_count=min_frequency,
        max_length=max_token_length,
        ids=ids,
        next_id=next_id,
        on_merge=progress,
    )
    index = {symbol: i for i, symbol in enumerate(symbols)}
    pairs = np.empty((len(merges), 2), dtype=np.int64)
    for i, (left, right, _) in enumerate(merges):
        pairs[i] = index[left], index[right]
        index[left + right] = len(symbols) + i
    strings = [*symbols, *(left + right for left, right, _ in merges)]
    return strings, pairs, np.array([m[2] for m in merges], dtype=np.int64)
