"""Models and training states on disk: safetensors for numbers, JSON for the rest, no pickle.

A model directory holds `model.safetensors` and `config.json`; a checkpoint directory holds
`training.safetensors` and `training.json` beside them. Each JSON names the size and CRC-32 of its
safetensors file, so a damaged copy is told from a good one before anything is loaded. Directories
of checkpoints are written under another name and renamed when complete: at any moment a reader
finds whole ones only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.models.base import LanguageModel, build_model
from lmfast.training.files import CheckpointError, read_pair, sync, write_pair
from lmfast.training.low_rank import attach_settings, settings_of

_STEP_NAME = re.compile(r"step-(\d{8,})")


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
    model = uncompiled(model)
    config = getattr(model, "config", {"model": type(model).__name__})
    content = {"model": config}
    if (updates := settings_of(model)) is not None:
        content["low_rank"] = updates
    write_pair(directory, "model", "config", model.state_dict(), content)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside what `torch.compile` made of it: files have its own names."""
    return getattr(model, "_orig_mod", model)


def load_model(directory: str | Path, *, device: torch.device | str = "cpu") -> LanguageModel:
    """Make the model that was saved in a model or checkpoint directory.

    Raises:
        CheckpointError: a file is missing, damaged, or not from this package.
    """
    tensors, content = read_pair(Path(directory), "model", "config")
    try:
        model = build_model(content["model"])
        if "low_rank" in content:
            attach_settings(model, content["low_rank"])
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
        write_pair(partial, "training", "training", tensors, content)
        if directory.exists():
            os.rename(directory, replaced)
        os.rename(partial, directory)
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
    sync(directory.parent)


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
    parameters, config = read_pair(directory, "model", "config")
    tensors, content = read_pair(directory, "training", "training")
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
