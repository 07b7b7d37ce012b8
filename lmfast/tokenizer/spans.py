"""Where tokens lie in a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .added_tokens import AddedTokens
from .model import Model
from .patterns import named_expression
from .reference import Specials, sound_text


def character_spans(
    model: Model, text: str, ids: np.ndarray, specials: Sequence[tuple[bytes, int]]
) -> list[tuple[int, int]]:
    """For each id the range of characters of which it has at least one byte.

    ``specials`` are the special tokens that were matched when the text was encoded.
    """
    sound = sound_text(text)
    if model.mode == "char":
        spans = _word_spans(model, sound, ids.tolist(), specials)
    else:
        spans = _byte_spans(model, sound, ids)
    return _in_text(text, sound, spans)


def located_spans(
    model: Model, text: str, rules: AddedTokens, encode: Callable[[str], list[int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text, part by part, and the characters that each covers, before normalization.

    Args:
        model: a byte-level tokenizer's data.
        text: the text.
        rules: of the special tokens.
        encode: normalized text without special tokens -> ids.
    """
    sound = sound_text(text)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for part in rules.split(sound, located=True):
        if part.id is not None:
            ids.append(part.id)
            end = spans[-1][1] if spans else 0
            spans.append((part.places[0][0], part.places[-1][1]) if part.places else (end, end))
            continue
        some = encode(part.text)
        ids += some
        for a, b in _byte_spans(model, part.text, np.array(some, dtype=np.int64)):
            spans.append((part.places[a][0], part.places[b - 1][1]))
    return ids, _in_text(text, sound, spans)


def _in_text(text: str, sound: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of the sound text as spans of the text."""
    if len(sound) == len(text):
        return spans
    # Pairs of surrogates were joined: find where each character began.
    starts, at = [0], 0
    for c in sound:
        at += 2 if text[at] != c and ord(c) > 0xFFFF else 1
        starts.append(at)
    return [(starts[a], starts[b]) for a, b in spans]


def _byte_spans(model: Model, text: str, ids: np.ndarray) -> list[tuple[int, int]]:
    if len(ids) == 0:
        return []
    raw = np.frombuffer(text.encode(), dtype=np.uint8)
    lengths = model.byte_lengths[ids]
    ends = np.cumsum(lengths)
    character = np.cumsum((raw & 0xC0) != 0x80) - 1
    return list(zip(character[ends - lengths].tolist(), (character[ends - 1] + 1).tolist()))


def _word_spans(
    model: Model, text: str, ids: list[int], specials: Sequence[tuple[bytes, int]]
) -> list[tuple[int, int]]:
    """The ids follow the words; a word's first token has the marker in front, which is no text."""
    lengths, unk = model.char_lengths, model.special_tokens[model.unk or ""]
    words = named_expression(model.pattern or "words")
    spans: list[tuple[int, int]] = []
    at = 0
    for part, special in Specials(specials).split(text):
        if special is not None:
            spans.append((at, at + len(part)))
        else:
            for word in words.finditer(part):
                start, end = at + word.start(), at + word.end()
                position = start - 1
                while position < end:
                    id = ids[len(spans)]
                    stop = position + (1 if id == unk else int(lengths[id]))
                    spans.append((max(position, start), stop))
                    position = stop
        at += len(part)
    return spans
