"""Tensors in safetensors with a JSON that vouches for them; no pickle."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_FORMAT = "lmfast"
_VERSION = 1


class CheckpointError(ValueError):
    """A model or checkpoint on disk is absent, damaged, foreign, or of another model."""


def write_pair(
    directory: Path,
    tensor_name: str,
    json_name: str,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
) -> None:
    """Write the safetensors file, then the JSON that vouches for it.

    Raises:
        OSError: they cannot be written, for instance because the disk is full.
    """
    path = directory / f"{tensor_name}.safetensors"
    temporary = path.with_suffix(".tmp")
    # Clones: views of a packed matrix share memory, which safetensors refuses.
    layout = torch.contiguous_format
    plain = {k: t.detach().cpu().clone(memory_format=layout) for k, t in tensors.items()}
    try:
        save_file(plain, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # its name for a full disk, too
        raise OSError(f"cannot write {temporary}: {error}") from error
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "file": path.name,
        "bytes": temporary.stat().st_size,
        "crc32": _crc32(temporary),
    }
    sync(temporary)
    text = json.dumps({**header, **content}, indent=1)
    json_path = directory / f"{json_name}.json"
    json_temporary = json_path.with_suffix(".json.tmp")
    json_temporary.write_text(text + "\n", encoding="utf-8")
    sync(json_temporary)
    os.replace(temporary, path)
    os.replace(json_temporary, json_path)
    sync(directory)


def read_pair(
    directory: Path, tensor_name: str, json_name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON's content.

    Raises:
        CheckpointError: a file is missing, damaged, or not from this package.
    """
    json_path = directory / f"{json_name}.json"
    path = directory / f"{tensor_name}.safetensors"
    for needed in (json_path, path):
        if not needed.is_file():
            raise CheckpointError(f"{directory} is no {tensor_name} directory: no {needed.name}")
    try:
        content = json.loads(json_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{json_path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{json_path} was not written by lmfast")
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{json_path} has version {content.get('version')}, this lmfast reads {_VERSION}"
        )
    size = path.stat().st_size
    if size != content.get("bytes"):
        raise CheckpointError(f"{path} is damaged: {size} bytes, not {content.get('bytes')}")
    if _crc32(path) != content.get("crc32"):
        raise CheckpointError(f"{path} is damaged: its checksum is not the one in {json_path.name}")
    try:
        # Copies: the tensors are views of the mapped file, which an optimiser would keep mapped
        # after it is deleted, and whose truncation would crash the process.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}, content
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk; that it does not fit may show only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot tell
            raise
    finally:
        os.close(descriptor)
