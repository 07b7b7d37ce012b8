"""The C allocator's part in the speed of memory-bound CPU operators."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys

# glibc's <malloc.h> names; -1 as a threshold means the largest size there is.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_NEVER = -1
_TOP_PAD = 64 * 2**20

_HUGE_PAGE = 2 * 2**20
_HUGE_PAGE_MODES = "/sys/kernel/mm/transparent_hugepage/enabled"
_LARGEST_RESERVE = 8 * 2**30

_done: str | None = None


def tune_allocator() -> str:
    """Stops glibc from handing large blocks back to the system after every use.

    By default each fresh output of more than 32 MB, often a far smaller one, is mapped anew and
    pays a page fault every 4 KB: RMSNorm over 32 MB measures 20-28 ms then, and 5 ms when the
    memory is at hand. This turns off glibc's use of mmap for large blocks (its threshold cannot
    be raised above 32 MB) and the trimming of its heap, so that freed blocks are used again; and
    it asks for transparent huge pages in the heap where the system grants them on request.
    Memory once used stays with the process. Call it once, early; later calls change nothing.

    Returns:
        What was done, or why nothing was.

    Example:
        >>> import lmfast
        >>> what = lmfast.tune_allocator()
    """
    global _done
    if _done is None:
        _done = _tune()
    return _done


def _tune() -> str:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return f"nothing done: {platform.system()} without glibc's allocator"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return f"nothing done: another allocator is preloaded ({preloaded})"
    libc = ctypes.CDLL(None)
    settings = {
        "mmap for large blocks": (_M_MMAP_MAX, 0),
        "trimming of the heap": (_M_TRIM_THRESHOLD, _NEVER),
        "growth in small steps": (_M_TOP_PAD, _TOP_PAD),
    }
    refused = [name for name, (key, value) in settings.items() if libc.mallopt(key, value) != 1]
    if refused:
        return f"incomplete: glibc keeps its {', '.join(refused)}"
    return f"glibc keeps freed memory for reuse; {_request_huge_pages(libc)}"


def _request_huge_pages(libc: ctypes.CDLL) -> str:
    """Reserves heap (address space only, nothing is touched) and marks it for huge pages."""
    try:
        with open(_HUGE_PAGE_MODES) as file:
            mode = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "this system offers no huge pages"
    if mode != "madvise":
        return f"huge pages: the system's setting is '{mode}' for every process"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(_LARGEST_RESERVE, memory // 2)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:
        return "huge pages not requested: no address space to reserve"
    first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    length = (block + size - first) // _HUGE_PAGE * _HUGE_PAGE
    status = libc.madvise(first, length, mmap.MADV_HUGEPAGE)
    libc.free(block)
    if status != 0:
        return "huge pages refused by the system"
    return f"huge pages requested for {length / 2**30:.1f} GiB of heap"
