"""Which backend was fastest on a kind of GPU, for an op and a class of sizes: data, not rules.

``ops/gpu_choices.json`` is written by ``python -m benchmarks.gpu --choose`` on a
machine with that GPU:

    {"NVIDIA-H200": {"linear bfloat16 16x4096 4096x4096": {"triton": 11.2, "torch": 9.8}, ...}}

in microseconds. The classes are the shapes of a call's first three tensors, each size rounded up to
a power of two, so that sizes between two of them are chosen alike. A GPU or class that is not there
has the op's own order.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).parent / "ops" / "gpu_choices.json"
Table = dict[str, dict[str, dict[str, float]]]
# What was measured, by kind of GPU.
TABLE: Table = json.loads(PATH.read_text()) if PATH.exists() else {}

# While it is a list, every choice adds (op, class) to it: how the benchmark learns the classes.
asked: list[tuple[str, str]] | None = None


@cache
def device_kind(device: torch.device) -> str:
    """The name of a GPU as it stands in the table and in file names."""
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-")


def class_of(op: str, args: tuple[Any, ...]) -> str:
    """The class of a call: op, dtype and rounded shapes of the first three tensors."""
    tensors = [a for a in args if isinstance(a, Tensor)][:3]
    shapes = ("x".join(str(1 << max(0, n - 1).bit_length()) for n in t.shape) for t in tensors)
    grad = any(t.requires_grad for t in tensors) and torch.is_grad_enabled()
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    return " ".join((op, dtype, *shapes, *(("with gradients",) if grad else ())))


def note(op: str, args: tuple[Any, ...]) -> None:
    """Adds a call to `asked`."""
    assert asked is not None
    asked.append((op, class_of(op, args)))


def choice(op: str, args: tuple[Any, ...]) -> tuple[str, str] | None:
    """(backend, why) where the call's class was measured on its GPU."""
    device = args[0].device
    # A compiled graph has sizes without numbers: there the op's own order holds.
    if device.type != "cuda" or not TABLE or torch.compiler.is_compiling():
        return None
    kind = device_kind(device)
    known = TABLE.get(kind)
    if known is None:
        return None
    return fastest(known.get(class_of(op, args)), kind)


def fastest(times: dict[str, float] | None, kind: str) -> tuple[str, str] | None:
    """(backend, why) from the times of a class."""
    if not times:
        return None
    ordered = sorted(times.items(), key=lambda item: item[1])
    figures = ", ".join(f"{backend} {us:.1f} us" for backend, us in ordered)
    return ordered[0][0], f"measured on {kind}: {figures}"
