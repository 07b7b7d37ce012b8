"""Text files that may be compressed by gzip, bzip2 or xz: read as they are stored, unpacked on the
way."""

from __future__ import annotations

import gzip
import io
import os
import threading
import zlib
from typing import Any, BinaryIO

# What files that are not read here begin with, and what unpacks them.
_OTHERS = {b"\x28\xb5\x2f\xfd": "unzstd", b"PK\x03\x04": "unzip"}
# What reading a damaged file raises.
DAMAGED: tuple[type[Exception], ...] = (zlib.error, gzip.BadGzipFile, EOFError)
try:
    from lzma import LZMAError
except ImportError:  # a Python built without it reads no xz
    pass
else:
    DAMAGED += (LZMAError,)
_FAILED: tuple[type[Exception], ...] = (OSError, *DAMAGED)  # bzip2 has no error of its own
_TAR = slice(257, 262)  # where an archive says "ustar"


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file; damage is a ValueError that names the file."""

    def __init__(self, path: str | os.PathLike[str], file: BinaryIO, unpacked: Any) -> None:
        super().__init__()
        self._path, self._file, self._unpacked = path, file, unpacked

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._unpacked.readinto(buffer)
        except _FAILED as error:
            if getattr(error, "errno", None) is not None:  # of the disk, not of what is on it
                raise
            reason = f"{os.fspath(self._path)} is compressed and damaged: {error}"
            raise ValueError(reason) from None

    def close(self) -> None:
        self._unpacked.close()
        self._file.close()
        super().close()


def _decompressor(head: bytes) -> Any:
    """What reads a file that begins so, or None."""
    if head.startswith(b"\x1f\x8b\x08"):
        return gzip.open
    # Ordinary text may begin with the letters of the one, but not with the block behind them.
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        from bz2 import BZ2File

        return BZ2File
    if head.startswith(b"\xfd7zXZ\x00"):
        from lzma import LZMAFile

        return LZMAFile
    return None


def open_text(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a text file for reading its bytes, unpacked where it is compressed.

    What it begins with decides, not its name.

    Raises:
        OSError: the file cannot be read.
        ValueError: an archive, or a compression that is not read here; from any method that
            reads, a damaged file.
        ImportError: this Python is built without bzip2 or xz.
    """
    file = open(path, "rb")
    try:
        head = file.peek(512)
        decompressor = _decompressor(head)
        opened: io.BufferedReader = file
        if decompressor is not None:
            raw = _Unpacked(path, file, decompressor(file))
            opened = io.BufferedReader(raw, 1 << 16)
            head = opened.peek(512)
        unpack = next((by for magic, by in _OTHERS.items() if head.startswith(magic)), None)
        if unpack is None and head[_TAR] == b"ustar":
            unpack = "tar -xf"
        if unpack is not None:
            name = os.fspath(path)
            raise ValueError(f"{name} is an archive or compressed: unpack it first, with {unpack}")
        return opened
    except BaseException:
        file.close()
        raise


class BlockReader:
    """Reads a text file by blocks that end with a line, from any place.

    In a compressed file the next block is found at once, and another one by unpacking all that is
    before it. Several threads may read; processes and copies each have their own place.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._reading = threading.Lock()
        self._kept: tuple[int, int, io.BufferedReader] | None = None  # process, offset, file

    def __reduce__(self) -> tuple[type[BlockReader], tuple[Any]]:
        return BlockReader, (self._path,)

    def block(self, offset: int, size: int) -> tuple[bytes, bool]:
        """Return at least `size` bytes from `offset` on, and whether the file ends behind them.

        Raises:
            OSError, ValueError: as `open_text`.
        """
        with self._reading:
            file = self._file(offset)
            try:
                data = file.read(size)
                if data:
                    data += file.readline()
                last = not file.peek(1)
            except BaseException:
                file.close()
                raise
            if last or not isinstance(file.raw, _Unpacked):
                file.close()
            else:
                self._kept = os.getpid(), offset + len(data), file
            return data, last

    def _file(self, offset: int) -> io.BufferedReader:
        kept, self._kept = self._kept, None
        if kept is not None and kept[:2] == (os.getpid(), offset):
            return kept[2]
        file = open_text(self._path)
        if not isinstance(file.raw, _Unpacked):
            file.seek(offset)
            return file
        left = offset
        while left and (passed := file.read(min(left, 1 << 20))):
            left -= len(passed)
        return file
