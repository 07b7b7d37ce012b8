"""Encoding and decoding of text that arrives in parts."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any

import numpy as np

from .cuts import safe_cut

if TYPE_CHECKING:
    from .decoding import Decoding
    from .encoding import Coding


class Appender:
    """The encoding of a text that grows at its end.

    What can no longer change is encoded once. With a named pattern that is everything up to the
    last certain end of a piece, such as a space or the end of a line, so that appending costs in
    proportion to what is new; with a regular expression, no pattern, or added tokens that take
    the whitespace beside them or stand only for whole words, the whole text is encoded again
    whenever ids are asked for.

    Args:
        tokenizer: encodes; special tokens in the text become their ids, and none are put around it.
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
        # What follows, in the parts that came. Only its last character is looked at again.
        self._tail: list[str] = []
        self._last = ""
        model = tokenizer.model
        self._pattern = model.pattern if model.has_certain_ends else None
        self.append(text)

    def append(self, text: str) -> None:
        """Add text at the end."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if not text:
            return
        cut = safe_cut(self._last + text, self._pattern, self._tokenizer.model.joined_pairs)
        if cut:
            cut -= len(self._last)
            self._fixed += self._encode("".join((*self._tail, text[:cut])))
            self._tail = []
        self._tail.append(text[cut:])
        self._last = text[-1]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _rest(self) -> str:
        self._tail = ["".join(self._tail)]
        return self._tail[0]

    def ids(self) -> list[int]:
        """The ids of all text so far."""
        return self._fixed + self._encode(self._rest())

    def __len__(self) -> int:
        """The number of ids of all text so far."""
        return len(self._fixed) + self._tokenizer.count(self._rest(), add_special_tokens=False)


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

    def __init__(self, tokenizer: Decoding, *, errors: str = "replace") -> None:
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
