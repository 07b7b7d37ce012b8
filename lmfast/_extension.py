"""Loads the compiled modules, once, and keeps the reason when one is absent.

``_cpu`` and ``_cuda`` register implementations of the operators with torch (no Python symbols);
``_bpe`` is an ordinary extension module. A missing module is never an error here: operators fall
back to PyTorch, and ``lmfast.info()`` and ``lmfast.explain()`` show the reason kept in this file.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from lmfast import _variables

_PACKAGE = Path(__file__).parent


def _build_report() -> dict[str, str]:
    """What setup.py could not build, by module, and why; empty when it is not known."""
    try:
        return json.loads((_PACKAGE / "_build_report.json").read_text())
    except (OSError, ValueError):
        return {}


_not_built = _build_report()

CPU_ISA_LEVELS = ("default", "avx2", "avx512", "amx")

if os.environ.get("LMFAST_CPU_ISA", "default") not in ("", *CPU_ISA_LEVELS):
    _variables.refuse(
        f"LMFAST_CPU_ISA must be one of {', '.join(CPU_ISA_LEVELS)}, "
        f"got {os.environ['LMFAST_CPU_ISA']!r}"
    )


@dataclass(frozen=True)
class Extension:
    """A compiled module: its name, its file, and why it is not loaded (None: it is)."""

    name: str
    path: Path | None
    reason: str | None
    library: ctypes.CDLL | None = None
    module: ModuleType | None = None

    @property
    def loaded(self) -> bool:
        return self.reason is None


def _load_operators(name: str) -> Extension:
    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        return Extension(
            name, None, f"{name} was not built: {_not_built.get(name, 'no build ran')}"
        )
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Extension(name, path, f"{path.name} does not load: {error}")
    return Extension(name, path, None, library=library)


def _load_cuda() -> Extension:
    if torch.version.cuda is None:
        return Extension("_cuda", None, "this torch is built without CUDA")
    return _load_operators("_cuda")


def _load_module(name: str) -> Extension:
    try:
        module = importlib.import_module(f"lmfast.{name}")
    except ImportError as error:
        reason = str(error)
        if error.name == f"lmfast.{name}":
            reason = f"{name} was not built: {_not_built.get(name, 'no build ran')}"
        return Extension(name, None, reason)
    file = module.__file__
    return Extension(name, Path(file) if file else None, None, module=module)


cpu = _load_operators("_cpu")
cuda = _load_cuda()
bpe = _load_module("_bpe")

if cpu.library is not None:
    cpu.library.lmfast_cpu_isa.restype = ctypes.c_char_p
    cpu.library.lmfast_cpu_best_isa.restype = ctypes.c_char_p
    cpu.library.lmfast_cpu_features.restype = ctypes.c_char_p
    cpu.library.lmfast_set_cpu_isa.argtypes = [ctypes.c_char_p]
    cpu.library.lmfast_has_bf16_tiles.restype = ctypes.c_int


def cpu_isa() -> str | None:
    """The instruction-set level the CPU kernels run at; None without ``_cpu``."""
    return cpu.library.lmfast_cpu_isa().decode() if cpu.library is not None else None


def available_cpu_isas() -> tuple[str, ...]:
    """The levels this machine can run, lowest first; empty without ``_cpu``."""
    if cpu.library is None:
        return ()
    best = cpu.library.lmfast_cpu_best_isa().decode()
    return CPU_ISA_LEVELS[: CPU_ISA_LEVELS.index(best) + 1]


def cpu_features() -> str:
    """What the processor offers, space separated; empty without ``_cpu``."""
    return cpu.library.lmfast_cpu_features().decode() if cpu.library is not None else ""


def has_bf16_tiles() -> bool:
    """Whether kernels of bf16 tiles run at the current level: AMX, or AVX-512 with BF16."""
    return cpu.library is not None and bool(cpu.library.lmfast_has_bf16_tiles())


def set_cpu_isa(level: str) -> None:
    """Lowers or restores the level of the CPU kernels in this process, as LMFAST_CPU_ISA does.

    Raises:
        ValueError: an unknown level, or one above what this machine has.
        RuntimeError: ``_cpu`` is not loaded.
    """
    if cpu.library is None:
        raise RuntimeError(f"no CPU kernels to set a level for: {cpu.reason}")
    status = cpu.library.lmfast_set_cpu_isa(level.encode())
    if status == 1:
        raise ValueError(f"level must be one of {CPU_ISA_LEVELS}, got {level!r}")
    if status == 2:
        raise ValueError(f"level {level!r} is not available here: {available_cpu_isas()}")


def _tell_missing_level() -> None:
    """LMFAST_CPU_ISA only lowers: a level that is not here must not look as if it were used."""
    wanted, have = os.environ.get("LMFAST_CPU_ISA"), available_cpu_isas()
    if wanted and have and wanted not in have:
        warnings.warn(
            f"LMFAST_CPU_ISA={wanted}: this machine has {', '.join(have)}; {cpu_isa()} is used",
            RuntimeWarning,
            stacklevel=2,
        )


_tell_missing_level()
