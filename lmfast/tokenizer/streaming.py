"""Encoding and decoding of text that arrives in parts."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any

import numpy as np

from .patterns import safe_cut

if TYPE_CHECKING:
    from .encoding import Coding


class Appender:
    """The encoding of a text that grows at its end.

    What can no longer change is encoded once. With a named pattern that is everything up to the
    last letter or digit before a space, so that appending costs in proportion to what is new; with
    another pattern the whole text is encoded again when ids are asked for.

    Args:
        tokenizer: encodes; special tokens in the text become their ids.
        text: the first part.

    Example:
        >>> from lmfast import BPETokenizer
        >>> t = BPETokenizer.train(["ab ab ab"], 258)
        >>> a = t.appender("ab a")
        >>> a.append("b")
        >>> a.ids() == t.encode("ab ab")
        True
    """

    def __init__(self, tokenizer: Coding, text: str = "") -> None:
        self._tokenizer = tokenizer
        self._fixed: list[int] = []
        self._tail = ""
        # A special token with a space inside could span the cut.
        self._cuts = not any(" " in t or "\n" in t for t in tokenizer.model.special_tokens)
        self.append(text)

    def append(self, text: str) -> None:
        """Add text at the end."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        self._tail += text
        cut = safe_cut(self._tail, self._tokenizer.model.pattern) if self._cuts else 0
        if cut:
            self._fixed += self._tokenizer.encode(self._tail[:cut])
            self._tail = self._tail[cut:]

    def ids(self) -> list[int]:
        """The ids of all text so far."""
        return self._fixed + self._tokenizer.encode(self._tail)

    def __len__(self) -> int:
        """The number of ids of all text so far."""
        return len(self._fixed) + self._tokenizer.count(self._tail)


class StreamDecoder:
    """Text from ids that arrive one by one; a character is given out when all its bytes are there.

    Args:
        tokenizer: decodes.
        errors: "strict", "replace" or "ignore", for bytes that are not UTF-8.

    Example:
        >>> from lmfast import BPETokenizer
        >>> t = BPETokenizer.train([""], 256)
        >>> d = t.stream_decoder()
        >>> [d.push(id) for id in t.encode("é")] + [d.finish()]
        ['', 'é', '']
    """

    def __init__(self, tokenizer: Coding, *, errors: str = "replace") -> None:
        if errors not in ("strict", "replace", "ignore"):
            raise ValueError(f'errors must be "strict", "replace" or "ignore", got {errors!r}')
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = tokenizer.model.mode == "char"

    def push(self, ids: Any) -> str:
        """The text that became certain with one more id, or several."""
        ids = [ids] if isinstance(ids, (int, np.integer)) else ids
        text = self._decoder.decode(self._tokenizer.raw_bytes(ids))
        if self._at_start and text:
            # Where the words begin there is no space before the first.
            self._at_start = False
            text = text[1:] if text[0] == " " else text
        return text

    def finish(self) -> str:
        """What an unfinished character at the end decodes to; afterwards a new text may begin."""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        self._at_start = self._tokenizer.model.mode == "char"
        return rest
