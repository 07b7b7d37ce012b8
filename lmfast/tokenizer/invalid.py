"""Bytes that are not UTF-8, by tiktoken's rule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from .cuts import safe_cut
from .model import Model
from .patterns import splitter

_BLANK = frozenset(b" \n\t")


def encode_invalid(
    model: Model,
    text: str,
    rest: bytes,
    encode: Callable[[str], list[int]],
    merge: Callable[[bytes], list[int]],
) -> list[int]:
    """Ids of ``text`` followed by bytes of which the first is not UTF-8.

    The valid part is encoded as usual; its last piece (with all whitespace tokens before it where
    it begins with one) and the rest are merged as a single piece, whatever the pattern says.

    Args:
        model: the tokenizer's data.
        text: the valid part after the last special token.
        rest: everything from the first bad byte on.
        encode: text -> ids.
        merge: one piece -> ids.
    """
    ids = encode(text)
    unstable = b""
    if ids:
        tail = text[safe_cut(text, model.pattern) :]
        *_, last = splitter(model.pattern)(tail)
        count = len(merge(last.encode()))
        if _is_blank(model, ids[-count]):
            count += sum(
                1 for _ in takewhile(lambda id: _is_blank(model, id), ids[-count - 1 :: -1])
            )
        unstable = b"".join(model.tokens[id] or b"" for id in ids[-count:])
        ids = ids[:-count]
    return ids + merge(unstable + rest)


def _is_blank(model: Model, id: int) -> bool:
    return _BLANK.issuperset(model.tokens[id] or b"x")
