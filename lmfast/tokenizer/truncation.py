"""The longest beginning of a text that has few enough tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cuts import safe_cut
from .model import Model


def truncated(coding: Any, text: str, max_tokens: int, special: dict[str, Any]) -> str:
    """What `truncate` of a tokenizer returns, with keywords of its `offsets` and `count`."""
    for head in _heads(coding.model, text, max_tokens):
        ids, where = coding.offsets(head, **special)
        if len(ids) > max_tokens:
            break
    else:
        return text
    for keep in range(max_tokens, 0, -1):
        end = where[keep - 1][1]
        # A token that ends inside a character would count it for both neighbours.
        if where[keep][0] >= end and coding.count(text[:end], **special) <= max_tokens:
            return text[:end]
    return ""


def _heads(model: Model, text: str, tokens: int) -> Iterator[str]:
    """Longer and longer beginnings of a text, whose ids are the first of the whole text's; the last
    is the text."""
    size = 8 * tokens + 64
    while size < len(text) and model.has_certain_ends:
        cut = safe_cut(text[:size], model.pattern, model.joined_pairs)
        if cut:
            yield text[:cut]
        size *= 4
    yield text
