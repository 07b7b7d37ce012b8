"""Text from ids that arrive one by one, with any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Gives out text as its characters become certain.

    Args:
        tokenizer: a `BPETokenizer`, or anything with `decode(ids) -> str`, as transformers' are.

    Raises:
        TypeError: the tokenizer cannot decode.

    Example:
        >>> from lmfast import BPETokenizer
        >>> tokenizer = BPETokenizer.train([""], 256)
        >>> stream = TextStream(tokenizer)
        >>> [stream.push(i) for i in tokenizer.encode("né")] + [stream.finish()]
        ['n', '', 'é', '']
    """

    def __init__(self, tokenizer: Any) -> None:
        if not hasattr(tokenizer, "decode"):
            raise TypeError(f"tokenizer must have decode, {type(tokenizer).__name__} has not")
        self._tokenizer = tokenizer
        make = getattr(tokenizer, "stream_decoder", None)
        self._decoder = None if make is None else make()
        self._ids: list[int] = []
        self._given = 0  # tokens whose text has been given out
        self._context = 0  # where decoding begins again: a token's text depends on its neighbour

    def push(self, new_id: int) -> str:
        """The text that became certain with one more id."""
        if self._decoder is not None:
            return self._decoder.push(new_id)
        self._ids.append(new_id)
        text = self._new_text()
        if text.endswith("�"):  # an unfinished character
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text

    def finish(self) -> str:
        """What an unfinished character at the end decodes to."""
        if self._decoder is not None:
            return self._decoder.finish()
        text = self._new_text()
        self._context = self._given = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without the special tokens that some tokenizers put around it."""
    if hasattr(tokenizer, "stream_decoder"):
        return list(tokenizer.encode(text))
    return list(tokenizer.encode(text, add_special_tokens=False))


def until(text: str, stops: Sequence[str], start: int = 0) -> str:
    """Cut a text before the first of several texts behind a place."""
    ends = [place for stop in stops if (place := text.find(stop, start)) >= 0]
    return text[: min(ends, default=len(text))]
