"""Corpora that come as archives, from anywhere: nothing is written outside the place given."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from lmfast._compressed import DAMAGED
from lmfast.training.sources import DataError

_DAMAGED: tuple[type[Exception], ...] = (
    tarfile.TarError,
    zipfile.BadZipFile,
    *DAMAGED,
    RuntimeError,  # what zipfile says of an encrypted member
    NotImplementedError,  # and of a compression it does not know
)


class _Member(NamedTuple):
    name: str
    is_directory: bool
    is_file: bool
    open: Callable[[], IO[bytes] | None]


def extract_archive(
    archive: str | Path, directory: str | Path, *, sha256: str | None = None
) -> list[Path]:
    """Unpack a zip or tar archive into a directory.

    Args:
        archive: .zip, or .tar, also compressed by gzip, bzip2 or xz.
        directory: made if absent. Files of the same name in it are replaced, each at once.
        sha256: checksum of the archive, hexadecimal; it is compared before anything is unpacked.

    Returns:
        The files, in the archive's order.

    Raises:
        DataError: another checksum; not an archive, or a damaged one; or a member that would be
            written outside the directory, or is a link or a device: then nothing is unpacked.
        OSError: a file cannot be read or written.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> with zipfile.ZipFile(place / "corpus.zip", "w") as file:
        ...     file.writestr("texts/a.txt", "one line")
        >>> extract_archive(place / "corpus.zip", place / "corpus")[0].read_text()
        'one line'
    """
    archive, directory = Path(archive), Path(directory)
    if sha256 is not None:
        _compare(archive, sha256)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                return _unpack(archive, directory, _zip_members(zipped))
        with tarfile.open(archive) as tarred:
            return _unpack(archive, directory, _tar_members(tarred))
    except _DAMAGED as error:
        raise DataError(f"{archive} is not a zip or tar archive, or damaged: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        # bzip2 has no error of its own.
        raise DataError(f"{archive} is not a zip or tar archive, or damaged: {error}") from None


def _compare(archive: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        raise DataError(f"{archive} has the SHA-256 {digest.hexdigest()}, expected {expected}")


def _zip_members(archive: zipfile.ZipFile) -> list[_Member]:
    def member(info: zipfile.ZipInfo) -> _Member:
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the writer has no such thing
        is_file = kind in (0, stat.S_IFREG) and not info.is_dir()
        return _Member(info.filename, info.is_dir(), is_file, lambda: archive.open(info))

    return [member(info) for info in archive.infolist()]


def _tar_members(archive: tarfile.TarFile) -> list[_Member]:
    def member(info: tarfile.TarInfo) -> _Member:
        return _Member(info.name, info.isdir(), info.isfile(), lambda: archive.extractfile(info))

    return [member(info) for info in archive.getmembers()]


def _unpack(archive: Path, directory: Path, members: Sequence[_Member]) -> list[Path]:
    paths = [_place(archive, directory, member) for member in members]
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for member, path in zip(members, paths):
        if member.is_directory:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            source: Any = member.open()
            with source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        written.append(path)
    return written


def _place(archive: Path, directory: Path, member: _Member) -> Path:
    """Return where a member goes; links that are in the directory already are followed."""
    path = directory / member.name
    inside = "\0" not in member.name and path.resolve().is_relative_to(directory.resolve())
    if not inside or (path.resolve() == directory.resolve() and not member.is_directory):
        raise DataError(f"{archive}: {member.name!r} would be written outside {directory}")
    if not (member.is_file or member.is_directory):
        raise DataError(f"{archive}: {member.name!r} is neither a file nor a directory")
    return path
