"""From text to ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lmfast._compressed import open_text

# The ids of a new tokenizer begin with these; padding has id 0.
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `lmfast.BPETokenizer` has it."""

    def encode_batch(self, texts: Sequence[str], *, threads: int | None = None) -> list[np.ndarray]:
        """Return the ids of each text."""


def check_tokenizer(tokenizer: object) -> None:
    """Raise TypeError for what cannot encode texts."""
    if not hasattr(tokenizer, "encode_batch"):
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer must have encode_batch, as BPETokenizer does; {kind} has none")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, also one compressed by gzip, bzip2 or xz.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, an archive, or not UTF-8; names the file and the place.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = path.write_text("one line", encoding="utf-8")
        >>> read_text(path)
        'one line'
    """
    with open_text(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start}"
        ) from None


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """Split a text in two at a line break: all but its last part, and the last part.

    Args:
        text: anything.
        held_out: share of the characters in the last part, in [0, 1).

    Raises:
        ValueError: `held_out` is out of range.

    Example:
        >>> split_text("a\\nb\\nc\\nd\\n", 0.25)
        ('a\\nb\\nc\\n', 'd\\n')
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    cut = len(text) - int(len(text) * held_out)
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return text[:cut], text[cut:]


def encode_text(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the ids of a text as one int64 tensor (N,)."""
    check_tokenizer(tokenizer)
    return torch.from_numpy(np.asarray(tokenizer.encode_batch([text])[0], dtype=np.int64))


def encode_lines(tokenizer: Tokenizer, text: str) -> list[Tensor]:
    """Return the ids of every line that is not blank, each as an int32 tensor."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [torch.from_numpy(row) for row in encode_texts(tokenizer, lines)]


def encode_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    end_id: int | None = None,
    threads: int | None = None,
) -> list[np.ndarray]:
    """Return the ids of texts, all at once, on several threads without the GIL.

    Args:
        tokenizer: encodes.
        texts: any number.
        end_id: put behind each text.
        threads: None = all CPUs of the process.
    """
    check_tokenizer(tokenizer)
    rows = tokenizer.encode_batch(texts, threads=threads)
    if end_id is None:
        return rows
    end = np.array([end_id], dtype=np.int32)
    return [np.concatenate((row, end)) for row in rows]


def end_id(tokenizer: Any) -> int:
    """Return the id of a tokenizer's end-of-text token.

    Raises:
        ValueError: it has none.
    """
    found = getattr(tokenizer, "eos_id", None)
    if found is None:
        raise ValueError("the tokenizer has no <eos> token to mark ends of texts with")
    return found
