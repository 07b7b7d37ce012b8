"""Texts from files and data sets, a block at a time, from any position.

A position is a small JSON-ready mapping, so that a checkpoint can hold it. Blocks begin where the
one before ended; reading from the same position gives the same texts.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lmfast._compressed import BlockReader
from lmfast.training.file_identity import file_identity, stamp

Position = dict[str, int]
Paths = Sequence[str | Path] | str | Path

BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 1024
_JSON_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".bz2", ".xz")
_DIGITS = re.compile(r"\d+")


class DataError(ValueError):
    """A text that cannot be used, named by file and line or by row; or a file that changed."""


class TextSource(ABC):
    """Texts in a fixed order.

    Attributes:
        bad_lines: "error" or "skip", what happens at a text that cannot be used.
        digits: takes the place of every run of digits, such as "<num>"; None: they stay.
        skipped: places of the texts left out so far, such as "a.jsonl:17".
    """

    def __init__(self, bad_lines: str, digits: str | None = None) -> None:
        if bad_lines not in ("error", "skip"):
            raise ValueError(f'bad_lines must be "error" or "skip", got {bad_lines!r}')
        if digits is not None and not isinstance(digits, str):
            raise TypeError(f"digits must be a string or None, got {digits!r}")
        self.bad_lines = bad_lines
        self.digits = digits
        self.skipped: dict[str, None] = {}

    @abstractmethod
    def start(self) -> Position:
        """Return the position before the first text."""

    @abstractmethod
    def read(self, position: Position) -> tuple[list[str], Position | None]:
        """Return about 1 MB of texts, and where the next ones begin: None at the end.

        Raises:
            DataError: a text cannot be used and `bad_lines` is "error".
            OSError: a file cannot be read.
        """

    @abstractmethod
    def describe(self, position: Position) -> str:
        """Name a position for a message."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells these texts from others, JSON-ready."""

    def __iter__(self) -> Iterator[str]:
        position: Position | None = self.start()
        while position is not None:
            texts, position = self.read(position)
            yield from texts

    def _replaced(self, texts: list[str]) -> list[str]:
        """Put the placeholder in."""
        placeholder = self.digits
        if placeholder is None:
            return texts
        return [_DIGITS.sub(lambda run: placeholder, text) for text in texts]

    def _told(self, identity: dict[str, Any]) -> dict[str, Any]:
        return identity if self.digits is None else {**identity, "digits": self.digits}

    def _bad(self, place: str, reason: str) -> None:
        """Raise, or note a text that is left out and say so once."""
        if self.bad_lines == "error":
            raise DataError(f"{place}: {reason}")
        if place not in self.skipped:
            self.skipped[place] = None
            warnings.warn(f"left out: {place}: {reason}", stacklevel=2)


class _Files(TextSource):
    """Texts in files that are read by blocks of whole lines."""

    def __init__(self, paths: Paths, bad_lines: str, digits: str | None) -> None:
        super().__init__(bad_lines, digits)
        self.paths = _listed(paths)
        if not self.paths:
            raise ValueError("paths must name at least one file, got none")
        for path in filter(Path.is_dir, self.paths):
            raise IsADirectoryError(f"{path} is a directory of no data set: name the files in it")
        self._readers = [BlockReader(path) for path in self.paths]
        self._stamps = [stamp(path) for path in self.paths]
        self._identity = [file_identity(path) for path in self.paths]

    def start(self) -> Position:
        return {"file": 0, "offset": 0, "line": 1}

    def read(self, position: Position) -> tuple[list[str], Position | None]:
        index, offset, line = position["file"], position["offset"], position["line"]
        path = self.paths[index]
        self._check_unchanged(index)
        try:
            data, last = self._readers[index].block(offset, BLOCK_BYTES)
        except ValueError as error:
            raise DataError(str(error)) from None
        end = offset + len(data)
        data = data if offset else data.removeprefix(codecs.BOM_UTF8)
        texts = self._replaced(self._texts(path, data, line, last))
        if not last:
            return texts, {"file": index, "offset": end, "line": line + data.count(b"\n")}
        following = index + 1 < len(self.paths)
        return texts, {"file": index + 1, "offset": 0, "line": 1} if following else None

    def describe(self, position: Position) -> str:
        return f"{self.paths[position['file']]}:{position['line']}"

    def identity(self) -> dict[str, Any]:
        return self._told({"kind": type(self).__name__, "files": self._identity})

    def _check_unchanged(self, index: int) -> None:
        """Raise DataError if a file is another one than before: positions in it mean nothing now.

        Looking at size and time takes 2 us of the 2 ms that a block takes to read.
        """
        path, now = self.paths[index], stamp(self.paths[index])
        if now == self._stamps[index]:
            return
        if file_identity(path) != self._identity[index]:
            raise DataError(
                f"{path} has changed while it was read (it had {self._identity[index]['bytes']} "
                f"bytes, now {now[0]}): restore it, or start again"
            )
        self._stamps[index] = now  # touched, not changed

    @abstractmethod
    def _texts(self, path: Path, data: bytes, line: int, last: bool) -> list[str]:
        """Return the texts in the lines from number `line` on; `last`: the file ends there."""

    def _decoded(self, path: Path, data: bytes, line: int) -> str | None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            byte = data[error.start]
            self._bad(f"{path}:{line}", f"the line is not UTF-8 text: byte 0x{byte:02x}")
            return None


class TextFiles(_Files):
    """Plain text files.

    Args:
        paths: UTF-8 files, also compressed by gzip, bzip2 or xz, read in this order.
        lines: each line that is not blank is a text of its own; otherwise each file is one long
            text, given in blocks that end with a line.
        bad_lines: at a line that is not UTF-8, "error" or "skip".
        digits: takes the place of every run of digits.

    Raises:
        OSError: a file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = path.write_text("one\\n\\ntwo\\n", encoding="utf-8")
        >>> list(TextFiles([path], lines=True)), list(TextFiles([path]))
        (['one', 'two'], ['one\\n\\ntwo\\n'])
    """

    def __init__(
        self,
        paths: Paths,
        *,
        lines: bool = False,
        bad_lines: str = "error",
        digits: str | None = None,
    ) -> None:
        super().__init__(paths, bad_lines, digits)
        self.lines = lines

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "lines": self.lines}

    def _texts(self, path: Path, data: bytes, line: int, last: bool) -> list[str]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # the lines that can be read
            numbered = enumerate(data.split(b"\n"), line)
            decoded = (self._decoded(path, part, number) for number, part in numbered)
            text = "\n".join(part for part in decoded if part is not None)
        if not self.lines:
            # Files are joined as lines are.
            return [text if not last or text.endswith("\n") else text + "\n"] if text else []
        return [part.removesuffix("\r") for part in text.split("\n") if part.strip()]


class JsonLines(_Files):
    """Files with one JSON object per line, a text in one of its fields.

    Args:
        paths: UTF-8 files, also compressed by gzip, bzip2 or xz, read in this order.
        field: where the text is.
        bad_lines: at a line that is not UTF-8, not JSON, or has no text there, "error" or "skip".
        digits: takes the place of every run of digits in a text.

    Raises:
        OSError: a file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
        >>> _ = path.write_text('{"text": "one"}\\n{"text": "two"}\\n', encoding="utf-8")
        >>> list(JsonLines([path]))
        ['one', 'two']
    """

    def __init__(
        self,
        paths: Paths,
        *,
        field: str = "text",
        bad_lines: str = "error",
        digits: str | None = None,
    ) -> None:
        super().__init__(paths, bad_lines, digits)
        self.field = field

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "field": self.field}

    def _texts(self, path: Path, data: bytes, line: int, last: bool) -> list[str]:
        texts = []
        for number, part in enumerate(data.split(b"\n"), line):
            decoded = self._decoded(path, part, number) if part.strip() else None
            if decoded is None:
                continue
            try:
                text = json.loads(decoded)[self.field]
            except json.JSONDecodeError as error:
                self._bad(f"{path}:{number}", f"the line is not JSON: {error.msg}")
            except (KeyError, TypeError, IndexError):
                self._bad(f"{path}:{number}", f"there is no field {self.field!r}")
            else:
                if isinstance(text, str):
                    texts.append(text)
                else:
                    kind = type(text).__name__
                    self._bad(
                        f"{path}:{number}",
                        f"field {self.field!r} holds a value of type {kind}, not text",
                    )
        return [text for text in texts if text.strip()]


class DatasetTexts(TextSource):
    """The texts of a Hugging Face `datasets.Dataset` or `IterableDataset`.

    Args:
        dataset: rows are mappings.
        field: where a row has its text.
        bad_lines: at a row without a text there, "error" or "skip".
        digits: takes the place of every run of digits.

    Example:
        >>> rows = [{"text": "one"}, {"text": "two"}]
        >>> list(DatasetTexts(rows))  # a list of rows will do as well
        ['one', 'two']
    """

    def __init__(
        self,
        dataset: Any,
        *,
        field: str = "text",
        bad_lines: str = "error",
        digits: str | None = None,
    ) -> None:
        super().__init__(bad_lines, digits)
        self.dataset = dataset
        self.field = field
        self._rows: Iterator[Any] = iter(())
        self._next_row = -1  # of the open iterator
        self._reading = threading.Lock()  # several streams may read one source

    def start(self) -> Position:
        return {"row": 0}

    def read(self, position: Position) -> tuple[list[str], Position | None]:
        first = position["row"]
        with self._reading:
            if first != self._next_row:
                skip = getattr(self.dataset, "skip", None)
                self._rows = iter(skip(first)) if skip else islice(self.dataset, first, None)
            rows = list(islice(self._rows, _BLOCK_ROWS))
            next_row = self._next_row = first + len(rows)
        texts = [self._text(row, number) for number, row in enumerate(rows, first)]
        following = {"row": next_row} if len(rows) == _BLOCK_ROWS else None
        return self._replaced([text for text in texts if text.strip()]), following

    def describe(self, position: Position) -> str:
        return f"row {position['row']}"

    def identity(self) -> dict[str, Any]:
        rows = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        return self._told({"kind": "DatasetTexts", "field": self.field, "rows": rows})

    def _text(self, row: Any, number: int) -> str:
        try:
            text = row[self.field]
        except (KeyError, TypeError, IndexError):
            self._bad(f"row {number}", f"there is no field {self.field!r}")
            return ""
        if not isinstance(text, str):
            kind = type(text).__name__
            reason = f"field {self.field!r} holds a value of type {kind}, not text"
            self._bad(f"row {number}", reason)
            return ""
        return text


def open_texts(
    paths: Paths,
    *,
    lines: bool = False,
    field: str = "text",
    bad_lines: str = "error",
    digits: str | None = None,
) -> TextSource:
    """Return the source for what is at some paths: all text, all JSON lines, or one data set.

    Args:
        paths: files ending in .jsonl or .ndjson; or other files, taken as plain text; both also
            compressed by gzip, bzip2 or xz (.jsonl.gz); or one directory that
            `datasets.Dataset.save_to_disk` wrote.
        lines, field, bad_lines, digits: as in `TextFiles`, `JsonLines` and `DatasetTexts`.

    Raises:
        ValueError: the paths are of several kinds.
        ImportError: a data set, and `datasets` is not installed.
        OSError: a file cannot be read.
    """
    paths = _listed(paths)
    kinds = set(map(_kind, paths))
    if len(kinds) > 1:
        raise ValueError(f"data must be of one kind, got {' and '.join(sorted(kinds))}")
    if kinds == {"JSON lines"}:
        return JsonLines(paths, field=field, bad_lines=bad_lines, digits=digits)
    if kinds != {"a data set"}:
        return TextFiles(paths, lines=lines, bad_lines=bad_lines, digits=digits)
    if len(paths) > 1:
        raise ValueError(f"data must be one data set, got {len(paths)}")
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ImportError(f"{paths[0]} is a data set: to read it, pip install datasets") from None
    dataset = load_from_disk(str(paths[0]))
    return DatasetTexts(dataset, field=field, bad_lines=bad_lines, digits=digits)


def _listed(paths: Paths) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]


def _kind(path: Path) -> str:
    if (path / "dataset_info.json").is_file():
        return "a data set"
    name = path.stem if path.suffix in _COMPRESSED else path.name
    return "JSON lines" if name.endswith(_JSON_LINES) else "text"
