"""Which of a few launch configurations a kernel takes: measured once, kept, never at import.

A launcher names its kernel, a key (types and a class of sizes) and a fixed tuple of
configurations. The first call with a key on a GPU times each of them and keeps the fastest, for
this process and, in a file per kind of GPU, for later ones. Where timing is impossible or unwanted
(interpreter, a graph being captured, ``LMFAST_AUTOTUNE=0``) the first configuration is taken and
nothing is kept: it is the one that does well everywhere.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lmfast._measured import device_kind

Config = dict[str, Any]

_chosen: dict[str, dict[str, int]] = {}  # kind of device -> key -> index
_ROUNDS = 7


def pick(
    name: str,
    key: tuple[Any, ...],
    configs: Sequence[Config],
    device: torch.device,
    run: Callable[[Config], object],
) -> Config:
    """The configuration to launch with.

    Args:
        name: of the kernel.
        key: what the fastest configuration depends on: dtypes, sizes or classes of sizes.
        configs: the fixed set; the first is the default.
        device: of the operands.
        run: launches the kernel with a configuration; may be called many times.
    """
    if len(configs) == 1 or device.type != "cuda" or os.environ.get("LMFAST_AUTOTUNE") == "0":
        return configs[0]
    kind = device_kind(device)
    known = _chosen.get(kind)
    if known is None:
        known = _chosen[kind] = read(kind)
    entry = f"{name} {' '.join(map(str, key))} of {len(configs)}"
    index = known.get(entry)
    if index is None:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        times = [seconds(partial(run, c)) for c in configs]
        index = known[entry] = times.index(min(times))
        write(kind, known)
    return configs[index]


def size_class(n: int) -> int:
    """The power of two at or above: sizes between two of them are tuned alike."""
    return 1 << max(0, n - 1).bit_length()


def seconds(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    run()  # compiles
    times = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def folder() -> Path:
    """Where choices are kept: LMFAST_CACHE_DIR, or lmfast/ in the user's cache folder."""
    given = os.environ.get("LMFAST_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmfast"


def read(kind: str) -> dict[str, int]:
    """What was chosen before; nothing where the file is absent or damaged."""
    try:
        found = json.loads((folder() / f"triton-{kind}.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: i for k, i in found.items() if type(i) is int and i >= 0}


def write(kind: str, known: dict[str, int]) -> None:
    """Keeps choices, those of other processes among them; a folder that cannot be written is not
    an error: the next process measures again."""
    path = folder() / f"triton-{kind}.json"
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**read(kind), **known}, indent=0, sort_keys=True))
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
