"""What encoding and decoding accept: errors that name the argument, what it was and must be."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal, TypedDict

import numpy as np

Special = Literal["all"] | Collection[str]


class BatchOptions(TypedDict, total=False):
    """The keywords of `encode_batch` that do not change what it returns, for type checkers."""

    threads: int | None
    allowed_special: Special | None
    disallowed_special: Special | None
    add_special_tokens: bool


def check_text(text: object, name: str = "text") -> None:
    if not isinstance(text, (str, bytes)):
        several = name == "text" and isinstance(text, (list, tuple))
        hint = "; encode_batch takes several" if several else ""
        raise TypeError(f"{name} must be a str or bytes, got {type(text).__name__}{hint}")


def checked_texts(texts: Any) -> list[str | bytes]:
    """The texts of a batch as a list."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be an iterable of str or bytes, got {texts!r}")
    texts = list(texts)
    if not set(map(type, texts)) <= {str, bytes}:
        for i, text in enumerate(texts):
            check_text(text, f"texts[{i}]")
    return texts


def checked_special(name: str, value: Any) -> Any:
    """None, "all" or a collection of str, which may be read several times."""
    if value is None or (isinstance(value, str) and value == "all"):
        return value
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f'{name} must be None, "all" or a collection of str, got {value!r}')
    tokens = list(value)
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(f"{name} must hold str, got {token!r}")
    return tokens


def checked_ids(ids: Any, size: int, left_out: Collection[int]) -> Any:
    """Ids as the engine takes them: a list, or a contiguous array of native int32.

    Args:
        ids: what the caller gave.
        size: of the vocabulary.
        left_out: ids to leave out; if there are any every id is checked here, so that errors name
            its place in ``ids``.
    """
    if type(ids) is list:
        if not left_out:
            return ids
        for i, id in enumerate(ids):
            if not hasattr(id, "__index__"):
                raise TypeError(f"ids[{i}] must be an int, got {type(id).__name__}")
            if not 0 <= id < size:
                raise ValueError(f"ids[{i}] is {id}, which is not in the vocabulary")
        return [id for id in ids if id not in left_out]
    try:
        array = np.asarray(ids)
    except ValueError:
        raise TypeError(f"ids must be a one-dimensional sequence of ints, got {ids!r}") from None
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            "ids must be a one-dimensional sequence of ints, got "
            f"{type(ids).__name__} of shape {array.shape} and dtype {array.dtype}"
        )
    if left_out or array.dtype != np.int32:
        # Beyond 31 bits an id must not wrap into the vocabulary.
        far = np.flatnonzero((array < 0) | (array >= size))
        if far.size:
            raise ValueError(f"ids[{far[0]}] is {array[far[0]]}, which is not in the vocabulary")
    array = np.ascontiguousarray(array, dtype=np.int32)
    return array[~np.isin(array, list(left_out))] if left_out else array
