"""Environment variables that hold what cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn


def refuse(message: str) -> NoReturn:
    """Raise ValueError while the package is imported; end the command `lmfast` as argparse does.

    Its own code runs only after the import, too late to tell it in one line.
    """
    if _is_command():
        print(f"lmfast: error: {message}", file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(message)


def _is_command() -> bool:
    """Whether this process is `lmfast ...` or `python -m lmfast ...`."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # what Python writes there until it has found the module
        return any(word in ("lmfast", "-mlmfast") for word in sys.orig_argv[1:])
    return Path(started).stem == "lmfast"
