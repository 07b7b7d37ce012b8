"""Models and training states on disk: safetensors for numbers, JSON for the rest, no pickle.

A model directory holds `model.safetensors` and `config.json`; a checkpoint directory holds
`training.safetensors` and `training.json` beside them. Each JSON names the size and CRC-32 of its
safetensors file, so a damaged copy is told from a good one before anything is loaded. Directories
of checkpoints are written under another name and renamed when complete: at any moment a reader
finds whole ones only.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmfast.models.base import LanguageModel, build_model

_FORMAT = "lmfast"
_VERSION = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A model or checkpoint on disk is absent, damaged, foreign, or of another model."""


def save_model(directory: str | Path, model: nn.Module) -> None:
    """Write a model's parameters and configuration.

    Args:
        directory: made if absent; files of an earlier model in it are replaced, each at once.
        model: a `LanguageModel`, or any module (then `load_model` cannot rebuild it).

    Raises:
        OSError: the directory cannot be written.

    Example:
        >>> import tempfile
        >>> from lmfast.models import RecurrentLanguageModel
        >>> model, place = RecurrentLanguageModel(20, 4, 1, 0), tempfile.mkdtemp()
        >>> save_model(place, model)
        >>> load_model(place).num_parameters() == model.num_parameters()
        True
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = getattr(model, "config", {"model": type(model).__name__})
    _write_pair(directory, "model", "config", model.state_dict(), {"model": config})


def load_model(directory: str | Path, *, device: torch.device | str = "cpu") -> LanguageModel:
    """Make the model that was saved in a model or checkpoint directory.

    Raises:
        CheckpointError: a file is missing, damaged, or not from this package.
    """
    tensors, content = _read_pair(Path(directory), "model", "config")
    try:
        model = build_model(content["model"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory} does not hold a model of this package: {error}"
        ) from error
    return model.to(device)


def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
) -> None:
    """Write a model and its training state as one directory that appears only when complete.

    Raises:
        OSError: it cannot be written, for instance because the disk is full; what was at
            `directory` before is still there.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    replaced = directory.with_name(f".{directory.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        save_model(partial, model)
        _write_pair(partial, "training", "training", tensors, content)
        if directory.exists():
            os.rename(directory, replaced)
        os.rename(partial, directory)
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
    _sync(directory.parent)


def add_checkpoint(
    run: str | Path,
    step: int,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
    *,
    keep: int,
    spare: int | None,
) -> None:
    """Write the checkpoint of a step, then delete all but the last `keep` and that of `spare`.

    Raises:
        OSError: it cannot be written; names the last one that could be.
    """
    path = checkpoint_path(run, step)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, model, tensors, content)
    except OSError as error:
        existing = list_checkpoints(run)
        last = f"the last one is {existing[-1]}" if existing else "there is no earlier one"
        raise OSError(
            f"the checkpoint of step {step} could not be written: {error}; {last}"
        ) from error
    for old in list_checkpoints(run)[:-keep]:
        if spare is None or old != checkpoint_path(run, spare):
            shutil.rmtree(old)


def load_checkpoint(
    directory: str | Path,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return model tensors, model configuration, training tensors and training content.

    Raises:
        CheckpointError: as `load_model`.
    """
    directory = Path(directory)
    parameters, config = _read_pair(directory, "model", "config")
    tensors, content = _read_pair(directory, "training", "training")
    return parameters, config["model"], tensors, content


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Return the directory of the checkpoint of one step."""
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def recover_checkpoints(run: str | Path) -> None:
    """Clear away what a process that was killed while saving left behind.

    One killed between the two renames that replace a checkpoint by another of the same step left
    the old one under a hidden name; it gets its own back.
    """
    for hidden in Path(run, "checkpoints").glob(".step-*"):
        path = hidden.with_name(hidden.stem[1:])
        if hidden.suffix == ".replaced" and not path.exists():
            os.rename(hidden, path)
        else:
            shutil.rmtree(hidden)


def list_checkpoints(run: str | Path) -> list[Path]:
    """Return the checkpoints of a run, earliest first."""
    found = Path(run, "checkpoints").glob("step-*")
    named = ((_STEP_NAME.fullmatch(path.name), path) for path in found)
    return [path for _, path in sorted((int(m[1]), path) for m, path in named if m)]


def latest_checkpoint(run: str | Path) -> Path:
    """Return the last checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint to resume from")
    return found[-1]


def _write_pair(
    directory: Path,
    tensor_name: str,
    json_name: str,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
) -> None:
    """Write the safetensors file, then the JSON that vouches for it."""
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
    _sync(temporary)
    text = json.dumps({**header, **content}, indent=1)
    json_path = directory / f"{json_name}.json"
    json_temporary = json_path.with_suffix(".json.tmp")
    json_temporary.write_text(text + "\n", encoding="utf-8")
    _sync(json_temporary)
    os.replace(temporary, path)
    os.replace(json_temporary, json_path)
    _sync(directory)


def _read_pair(
    directory: Path, tensor_name: str, json_name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _sync(path: Path) -> None:
    """Wait until a file or directory is on the disk; that it does not fit may show only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot tell
            raise
    finally:
        os.close(descriptor)
