"""Where tokens lie in a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
