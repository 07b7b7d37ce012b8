"""Counting the words of a corpus and learning a tokenizer from them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lmfast._compressed import open_text

from .backend import default_threads, engine
from .byte_alphabet import BYTE_ORDER
from .cuts import safe_cut_bytes
from .model import Model
from .patterns import Pattern, scanner_code, splitter
from .reference import sound_text, to_bytes
from .training_arguments import (
    checked_counts,
    checked_pattern,
    checked_rules,
    checked_sizes,
    checked_specials,
    checked_threads,
)

Corpus = str | bytes | os.PathLike | Iterable[str | bytes | os.PathLike] | Mapping[str | bytes, int]
CHAR_SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
MARKER = "▁"
_BLOCK = 4 << 20
_ITEMS = 1 << 16
_TAIL = 1 << 16


class WordCounts(dict[bytes, int]):
    """Distinct words with their counts, in order of first appearance.

    Counts of parts of a corpus add up with ``+`` to the counts of the whole, wherever they were
    made: the object is a plain dict of bytes that pickles. Add the parts in corpus order where ties
    are broken by first appearance.
    """

    def __init__(self, words: Mapping[bytes, int], *, mode: str, pattern: Pattern) -> None:
        super().__init__(words)
        self.mode, self.pattern = mode, pattern

    def __add__(self, other: WordCounts) -> WordCounts:
        if not isinstance(other, WordCounts):
            return NotImplemented
        if (self.mode, self.pattern) != (other.mode, other.pattern):
            raise ValueError(
                f"counts of mode {self.mode!r}, pattern {self.pattern!r} cannot be added to "
                f"counts of mode {other.mode!r}, pattern {other.pattern!r}"
            )
        total = WordCounts(self, mode=self.mode, pattern=self.pattern)
        for word, count in other.items():
            total[word] = total.get(word, 0) + count
        return total

    def __reduce__(self):
        return _word_counts, (dict(self), self.mode, self.pattern)


def _word_counts(words: dict[bytes, int], mode: str, pattern: Pattern) -> WordCounts:
    return WordCounts(words, mode=mode, pattern=pattern)


def _file_blocks(path: os.PathLike, pattern: Pattern) -> Iterator[bytes]:
    """A file in blocks that end at piece boundaries, so that no piece is cut in two.

    Without a named pattern no boundary is certain before the end: the file is one block.
    """
    with open_text(path) as file:
        waiting: list[bytes] = []
        while block := file.read(_BLOCK):
            cut = safe_cut_bytes(block, pattern, _TAIL)
            if cut:
                yield b"".join((*waiting, block[:cut]))
                waiting = []
            waiting.append(block[cut:])
        if waiting:
            yield b"".join(waiting)


def _texts(corpus: Corpus, pattern: Pattern) -> Iterator[str | bytes]:
    if isinstance(corpus, (str, bytes)):
        yield corpus
    elif isinstance(corpus, os.PathLike):
        yield from _file_blocks(corpus, pattern)
    else:
        try:
            items = iter(corpus)
        except TypeError:
            raise TypeError(
                "corpus must be text, a path, an iterable of those or word counts, "
                f"got {type(corpus).__name__}"
            ) from None
        for item in items:
            if isinstance(item, os.PathLike):
                yield from _file_blocks(item, pattern)
            elif isinstance(item, (str, bytes)):
                yield item
            else:
                raise TypeError(f"corpus must yield str, bytes or paths, got {type(item).__name__}")


def _batches(corpus: Corpus, pattern: Pattern) -> Iterator[list[str | bytes]]:
    """Lists of texts, small enough for memory to stay bounded."""
    batch: list[str | bytes] = []
    size = 0
    for text in _texts(corpus, pattern):
        batch.append(text)
        size += len(text)
        if size >= 8 * _BLOCK or len(batch) == _ITEMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count(corpus: Corpus, mode: str, pattern: Pattern, threads: int | None, backend: str):
    """A Counter of the engine with the words of the corpus."""
    threads = checked_threads(threads)
    code = scanner_code(pattern)
    counter = engine(backend).Counter(code or 0)
    if isinstance(corpus, Mapping):
        counter.add_words(*checked_counts(corpus, mode, pattern))
        return counter
    if code is not None:
        threads = threads or default_threads()
        if isinstance(corpus, list):
            at = 0
            while (at := counter.add_texts(corpus, threads, at)) < len(corpus):
                for batch in _batches([corpus[at]], pattern):
                    counter.add_texts(batch, threads)
                at += 1
        else:
            for batch in _batches(corpus, pattern):
                counter.add_texts(batch, threads)
        return counter
    for batch in _batches(corpus, pattern):
        split = splitter(pattern)
        found: dict[bytes, int] = {}
        for text in batch:
            for piece in split(sound_text(text)):
                raw = to_bytes(piece)
                found[raw] = found.get(raw, 0) + 1
        counter.add_words(list(found), list(found.values()))
    return counter


def count_words(
    corpus: Corpus,
    *,
    mode: str = "byte",
    pattern: Pattern = "default",
    threads: int | None = None,
    backend: str = "auto",
) -> WordCounts:
    """Count the words of a corpus, or of a part of it, for training later or elsewhere.

    Args:
        corpus: text, a path, or an iterable of texts and paths. Files are read in blocks of a few
            MB; with a regular expression or no pattern each must fit in memory.
        mode: "byte" or "char", as for training.
        pattern: as for training.
        threads: None takes all CPUs of the process. The result does not depend on it.
        backend: "auto", "cpu" or "reference".

    Returns:
        WordCounts; ``count_words(a) + count_words(b)`` counts a corpus of the texts a and b. So any
        engine for distributed work can count a corpus, here Dask, of files that each worker reads::

            import operator, pathlib
            import dask.bag
            from lmfast import BPETokenizer
            from lmfast.tokenizer import count_words

            if __name__ == "__main__":  # the worker processes import this file
                paths = dask.bag.from_sequence(sorted(pathlib.Path("books").glob("*.txt")))
                counts = paths.map(count_words).fold(operator.add).compute()
                tokenizer = BPETokenizer.train(counts, 32_000)

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; names it.

    Backends:
        cpu: vectorised and threaded. reference: Python, the same counts.

    Example:
        >>> counts = count_words(["a b"], mode="char") + count_words(["b"], mode="char")
        >>> dict(counts)
        {b'a': 1, b'b': 2}
    """
    pattern = checked_pattern(mode, pattern)
    counter = _count(corpus, mode, pattern, threads, backend)
    return WordCounts(dict(counter.items()), mode=mode, pattern=pattern)


def train_models(
    corpus: Corpus,
    vocab_size: int | Sequence[int],
    *,
    mode: str,
    pattern: Pattern,
    special_tokens: Sequence[str] | None,
    min_frequency: int,
    max_token_length: int | None,
    tie_break: str,
    marker: str,
    unk_token: str,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
    backend: str,
) -> list[Model]:
    """The models for one or several vocabulary sizes, all from one run."""
    sizes = checked_sizes(vocab_size)
    pattern = checked_pattern(mode, pattern)
    rule, least_count, longest = checked_rules(tie_break, min_frequency, max_token_length, progress)
    if special_tokens is None:
        special_tokens = CHAR_SPECIALS if mode == "char" else ()
    specials = checked_specials(special_tokens, mode, marker, unk_token)
    taken = _taken(specials, mode)
    first, byte_ids, least = len(specials), None, 0
    if mode == "byte":
        byte_ids = [0] * 256
        for byte in BYTE_ORDER:
            if bytes([byte]) in taken:
                byte_ids[byte] = taken[bytes([byte])]
            else:
                byte_ids[byte] = first
                first += 1
        least = first
        if min(sizes) < least:
            raise ValueError(
                f"vocab_size must be at least {least} (256 bytes and {len(specials)} special "
                f"tokens), got {min(sizes)}"
            )
    counter = _count(corpus, mode, pattern, threads, backend)
    target = max(sizes) - least
    report = None if progress is None else lambda done: progress(done, target)
    strings, pairs, _ = engine(backend).learn(
        counter,
        byte_ids,
        marker,
        first,
        rule,
        target,
        least_count,
        longest,
        first if mode == "byte" else -1,
        taken,
        report,
    )
    if progress is not None:
        progress(len(pairs), target)
    symbols = len(strings) - len(pairs)
    ids = byte_ids if byte_ids is not None else list(range(first, first + symbols))
    options = {
        "mode": mode,
        "pattern": pattern,
        "special_tokens": specials,
        "marker": marker if mode == "char" else "",
        "unk": unk_token if mode == "char" else None,
    }
    # In the char mode the size counts symbols and merges only, as the textbook loop does.
    extra = len(specials) if mode == "char" else 0
    return [_assemble(ids, strings, pairs, taken, size + extra, options) for size in sizes]


def _taken(specials: dict[str, int], mode: str) -> dict[bytes, int]:
    """Strings whose token is a special one: Hugging Face lets a merge that makes the text of a
    special token have its id, and compares the printable stand-ins of the bytes."""
    if mode == "char":
        return {}
    return {t.encode(): id for t, id in specials.items() if all("!" <= c <= "~" for c in t)}


def _assemble(
    ids: list[int],
    strings: list[bytes],
    pairs: np.ndarray,
    taken: dict[bytes, int],
    size: int,
    options: dict[str, Any],
) -> Model:
    """Number the symbols, whose ids are given, and as many merges as fit."""
    symbols, specials = len(ids), options["special_tokens"]
    first = max(max(ids), len(specials) - 1) + 1
    head: list[bytes | None] = [None] * first
    for id, symbol in zip(ids, strings):
        head[id] = None if symbol in taken else symbol
    if not taken or taken.keys().isdisjoint(strings[symbols:]):
        count = min(len(pairs), max(size - first, 0))
        tokens = (*head, *itertools.islice(strings, symbols, symbols + count))
        numbers = np.concatenate([np.array(ids), np.arange(first, first + count)])
    else:
        numbers_of = list(ids)
        for string in strings[symbols:]:
            if len(head) >= size:
                break
            new = taken.get(string, len(head))
            if new == len(head):
                head.append(string)
            numbers_of.append(new)
        tokens = tuple(head)
        numbers = np.array(numbers_of, dtype=np.int64)
        count = len(numbers) - symbols
    merges = np.empty((count, 4), dtype=np.int64)
    merges[:, :2] = numbers.take(pairs[:count])
    merges[:, 2] = numbers[symbols:]
    merges[:, 3] = np.arange(count)
    return Model.trusted(tokens=tokens, merges=merges, whole_piece=False, **options)
