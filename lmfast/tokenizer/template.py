"""Tokens that stand before, between and after texts: the post-processors of Hugging Face's files.

A post-processor is kept as the JSON it was read from, so that it is written back unchanged; what it
adds to one text and to two is worked out once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# A template: "A" and "B" are the texts, other entries ids.
Pieces = tuple["str | int", ...]


class Template(NamedTuple):
    """What is added to one text, and to a pair of texts."""

    single: Pieces
    pair: Pieces

    @property
    def before(self) -> list[int]:
        """The ids before a single text."""
        return [p for p in self.single[: self.single.index("A")] if isinstance(p, int)]

    @property
    def after(self) -> list[int]:
        """The ids after a single text."""
        return [p for p in self.single[self.single.index("A") + 1 :] if isinstance(p, int)]

    def join(self, first: Sequence[int], second: Sequence[int] | None = None) -> list[int]:
        """The ids of one or two texts with what is added."""
        ids: list[int] = []
        for piece in self.single if second is None else self.pair:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += first if piece == "A" else second or ()
        return ids


NOTHING = Template(("A",), ("A", "B"))


@functools.lru_cache(maxsize=64)
def template_of(post_processor: str | None) -> Template:
    """What a post-processor, as JSON text, adds.

    Raises:
        ValueError: it has no counterpart here; names the part.
    """
    if post_processor is None:
        return NOTHING
    return _template(json.loads(post_processor))


def _template(step: Any) -> Template:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "ByteLevel":  # concerns offsets only
        return NOTHING
    if kind == "Sequence":
        steps = step.get("processors")
        if not isinstance(steps, list):
            raise ValueError(f"the post_processor Sequence has no processors: {step!r}")
        adding = [found for found in map(_template, steps) if found != NOTHING]
        if len(adding) > 1:
            raise ValueError("the post_processor Sequence adds tokens in two steps: not supported")
        return adding[0] if adding else NOTHING
    if kind == "TemplateProcessing":
        ids = step.get("special_tokens")
        if not isinstance(ids, dict):
            raise ValueError(f"the post_processor TemplateProcessing: special_tokens is {ids!r}")
        single = _pieces(step.get("single"), ids, "single", ("A",))
        return Template(single, _pieces(step.get("pair"), ids, "pair", ("A", "B")))
    if kind in ("RobertaProcessing", "BertProcessing"):
        cls, sep = (_pair_id(step, key, kind) for key in ("cls", "sep"))
        between = (sep, sep) if kind == "RobertaProcessing" else (sep,)
        return Template((cls, "A", sep), (cls, "A", *between, "B", sep))
    raise ValueError(f"the post_processor {kind or step} is not supported")


def _pair_id(step: Mapping[str, Any], key: str, kind: str) -> int:
    value = step.get(key)
    if not isinstance(value, list) or len(value) != 2 or type(value[1]) is not int:
        raise ValueError(f"the post_processor {kind}: {key} must be [token, id], got {value!r}")
    return value[1]


def _pieces(parts: Any, ids: Mapping[str, Any], name: str, texts: tuple[str, ...]) -> Pieces:
    where = f"the post_processor TemplateProcessing: {name}"
    if not isinstance(parts, list):
        raise ValueError(f"{where} must be a list, got {parts!r}")
    found: list[str | int] = []
    for part in parts:
        kind, value = next(iter(part.items())) if isinstance(part, dict) and part else (None, None)
        if kind not in ("Sequence", "SpecialToken") or not isinstance(value, dict):
            raise ValueError(f"{where} holds {part!r}, which is neither Sequence nor SpecialToken")
        if kind == "Sequence":
            found.append(str(value.get("id")))
            continue
        token = ids.get(str(value.get("id")))
        numbers = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise ValueError(f"{where} needs the ids of {value.get('id')!r} in special_tokens")
        found += numbers
    if sorted(p for p in found if isinstance(p, str)) != list(texts):
        raise ValueError(f"{where} must hold {' and '.join(texts)} once, got {parts!r}")
    return tuple(found)
