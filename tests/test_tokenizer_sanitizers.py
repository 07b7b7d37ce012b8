"""The engine and its fuzz target under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import base64
import os
import platform
import shutil
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmfast.tokenizer.unicode_classes import RUNS

ROOT = Path(__file__).parents[1]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt", "-maes"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "cd", "vbmi", "vbmi2"))]


def test_fuzz_target_under_sanitizers(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [compiler, *SANITIZE, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} has no sanitizers")
    # What needs Python stays out: the engine itself knows neither Python nor torch.
    sources = [
        path
        for path in sorted((ROOT / "csrc" / "bpe").glob("*.cpp"))
        if not path.name.startswith(("bind", "python_text"))
    ]
    sources.append(ROOT / "tests" / "fuzz" / "bpe_fuzz.cpp")
    x86 = platform.machine().lower() in ("x86_64", "amd64")

    def compile_one(source: Path) -> Path:
        flags = []
        if x86 and source.stem.endswith("_avx512"):
            flags = AVX512
        elif x86 and source.stem.endswith("_avx2"):
            flags = AVX2
        target = tmp_path / f"{source.stem}.o"
        subprocess.run(
            [compiler, "-std=c++17", "-O1", "-w", *SANITIZE, *flags, "-DBPE_FUZZ_MAIN"]
            + [f"-I{ROOT / 'csrc' / 'bpe'}", "-c", str(source), "-o", str(target)],
            check=True,
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = tmp_path / "bpe_fuzz"
    link = [compiler, *SANITIZE, *map(str, objects), "-o", str(program), "-lpthread"]
    subprocess.run(link, check=True)
    classes = tmp_path / "classes.bin"
    classes.write_bytes(zlib.decompress(base64.b85decode(RUNS)))
    runs = os.environ.get("LMFAST_FUZZ_RUNS", "300")
    result = subprocess.run(
        [str(program), str(classes), runs, os.environ.get("LMFAST_FUZZ_SEED", "0")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"{runs} runs" in result.stdout
