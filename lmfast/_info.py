"""What is installed, what was loaded or why not, and which op runs where."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import torch

from lmfast import _dispatch, _extension
from lmfast._version import __version__


def info() -> str:
    """A report for people and bug reports: versions, processor, modules, op x backend table.

    Returns:
        Lines of text, also printed by ``python -m lmfast info``.

    Example:
        >>> import lmfast
        >>> print(lmfast.info().splitlines()[0])  # doctest: +ELLIPSIS
        lmfast ...
    """
    return "\n".join([*_versions(), "", *_processor(), "", *_modules(), "", *_table()])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _versions() -> list[str]:
    cuda = torch.version.cuda or "none"
    return [
        f"lmfast {__version__}, torch {torch.__version__} (CUDA {cuda}), Python "
        f"{platform.python_version()} on {sys.platform} {platform.machine()}",
        f"triton {_version('triton')}, numpy {_version('numpy')}, "
        f"transformers {_version('transformers')}",
    ]


def _processor() -> list[str]:
    lines = [f"threads: {torch.get_num_threads()}"]
    if _extension.cpu.loaded:
        levels = " ".join(_extension.available_cpu_isas())
        lines.append(f"CPU level: {_extension.cpu_isa()} (of {levels}; LMFAST_CPU_ISA lowers it)")
        lines.append(f"CPU features: {_extension.cpu_features() or 'none known'}")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        lines.append(f"GPU: {torch.cuda.get_device_name()} (compute capability {major}.{minor})")
    else:
        lines.append("GPU: none that torch can use")
    return lines


def _modules() -> list[str]:
    return [
        f"{extension.name}: {'loaded' if extension.loaded else extension.reason}"
        for extension in (_extension.cpu, _extension.bpe, _extension.cuda)
    ]


def _table() -> list[str]:
    """Op x backend: 'forward' or 'fwd+bwd' where written, '-' where not; and what cannot run."""
    names = _dispatch.BACKENDS
    width = max(len(name) for name in _dispatch.ops()) + 2
    lines = ["op".ljust(width) + "".join(b.ljust(10) for b in names)]
    for name, op in sorted(_dispatch.ops().items()):
        cells = []
        for backend in names:
            kind = "fwd+bwd" if op.differentiable else "forward"
            cells.append(kind if backend in op.implementations else "-")
        lines.append((name.ljust(width) + "".join(c.ljust(10) for c in cells)).rstrip())
    return [*lines, *(f"{backend} does not run here: {why}" for backend, why in _absent())]


def _absent() -> Iterator[tuple[str, str]]:
    """The backends that no operator can have on this machine, and why."""
    without_gpu = None if torch.cuda.is_available() else "no GPU that torch can use"
    if not _extension.cpu.loaded:
        yield "cpu", str(_extension.cpu.reason)
    triton = None if _version("triton") != "absent" else "triton is not installed"
    if reason := without_gpu or triton:
        yield "triton", reason
    if reason := _extension.cuda.reason or without_gpu:
        yield "cuda", reason
