"""How much memory this process holds, and has held at most."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Return the memory this process holds now; where the system does not tell, its peak."""
    return _status("VmRSS") or _peak_usage()


def peak_bytes() -> int:
    """Return the most memory this process ever held at once.

    /proc is asked first: getrusage carries the peak of the parent process over to a child.
    """
    return _status("VmHWM") or _peak_usage()


def peak_device_bytes() -> int:
    """Return the most memory PyTorch held on the current GPU, 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _status(name: str) -> int:
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _peak_usage() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
