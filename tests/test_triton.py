"""Runs triton_interpreted*.py with Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


def test_kernels_in_the_interpreter() -> None:
    folder = Path(__file__).parent
    files = sorted(map(str, folder.glob("triton_interpreted*.py")))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-x", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_importing_lmfast_does_not_import_triton() -> None:
    """Triton costs a quarter of a second that a CPU user would pay at every start."""
    code = "import sys, lmfast; sys.exit('triton' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
