"""The engine that does the work: compiled where it could be loaded, else the readable reference."""

from __future__ import annotations

import base64
import os
import zlib

from lmfast import _extension

from . import reference, unicode_classes

BACKENDS = ("auto", "cpu", "reference")


_compiled, missing_reason = _extension.bpe.module, _extension.bpe.reason
if _compiled is not None:
    _compiled.set_character_classes(zlib.decompress(base64.b85decode(unicode_classes.RUNS)))


def engine(backend: str = "auto"):
    """The module that has Encoder, Decoder, Specials, Counter and learn.

    Raises:
        ImportError: "cpu" was asked for and the compiled engine is absent; says why.
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and _compiled is None):
        return reference
    if _compiled is None:
        raise ImportError(f"the compiled tokenizer engine is absent: {missing_reason}")
    return _compiled


def default_threads() -> int:
    """The CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
