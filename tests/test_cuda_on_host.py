"""The CUDA kernels on the CPU, a thread per CUDA thread, under sanitizers. Needs no GPU.

Values against double precision; AddressSanitizer sees every access out of bounds,
UndefinedBehaviorSanitizer every misaligned vector, ThreadSanitizer every race between the threads
of a block. What a real GPU adds is its own arithmetic and speed: test_gpu.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "tests/cuda_on_host").glob("*.cpp"))
COMPILER = shutil.which("g++")


def _cuda_include() -> Path | None:
    """Where cuda_bf16.h is: in the toolkit, or in triton, which carries a copy."""
    folders = []
    if (nvcc := shutil.which("nvcc")) is not None:
        folders.append(Path(nvcc).resolve().parent.parent / "include")
    folders.append(Path("/usr/local/cuda/include"))
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    return next((f for f in folders if (f / "cuda_bf16.h").exists()), None)


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_kernels_on_the_host(source: Path, sanitizer: str, tmp_path: Path) -> None:
    include = _cuda_include()
    if COMPILER is None or include is None:
        pytest.skip("needs g++ and CUDA's headers (cuda_bf16.h)")
    program = tmp_path / "program"
    command = [
        *(COMPILER, "-std=c++17", "-O0", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
        *("-Werror", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"),
        *(f"-I{ROOT}", f"-I{source.parent}", "-isystem", str(include)),
        *(str(source), "-o", str(program)),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"g++ has no library for -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr[-6000:]
    quick = ["quick"] if sanitizer == "thread" else []
    ran = subprocess.run([str(program), *quick], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address randomisation")
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
