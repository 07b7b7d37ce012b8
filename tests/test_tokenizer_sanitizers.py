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


def compiles(command: list[str], folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text(
        "#include <cstddef>\n#include <cstdint>\n"
        'extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }\n'
        "#ifndef LIBFUZZER\nint main() {}\n#endif\n"
    )
    command = [*command, str(probe), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_fuzz_target_under_sanitizers(tmp_path):
    """The target by libFuzzer where clang has it, else by its own driver."""
    sources = [ROOT / "tests" / "fuzz" / "bpe_fuzz.cpp"]
    clang = shutil.which("clang++")
    fuzzer = ["-fsanitize=fuzzer", "-DLIBFUZZER"]
    if clang and compiles([clang, *SANITIZE, *fuzzer], tmp_path):
        compiler, how = clang, ["-fsanitize=fuzzer"]
    else:
        compiler, how = os.environ.get("CXX") or shutil.which("g++") or clang, []
        sources.append(ROOT / "tests" / "fuzz" / "driver.cpp")
        if compiler is None:
            pytest.skip("no C++ compiler")
        if not compiles([compiler, *SANITIZE], tmp_path):
            pytest.skip(f"{compiler} has no sanitizers")
    # What needs Python stays out: the engine itself knows neither Python nor torch.
    sources += [
        path
        for path in sorted((ROOT / "csrc" / "bpe").glob("*.cpp"))
        if not path.name.startswith(("bind", "python_text"))
    ]
    x86 = platform.machine().lower() in ("x86_64", "amd64")

    def compile_one(source: Path) -> Path:
        flags = ["-fsanitize=fuzzer-no-link"] if how else []
        if x86 and source.stem.endswith("_avx512"):
            flags += AVX512
        elif x86 and source.stem.endswith("_avx2"):
            flags += AVX2
        target = tmp_path / f"{source.stem}.o"
        subprocess.run(
            [compiler, "-std=c++17", "-O1", "-w", *SANITIZE, *flags]
            + [f"-I{ROOT / 'csrc' / 'bpe'}", "-c", str(source), "-o", str(target)],
            check=True,
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = tmp_path / "bpe_fuzz"
    link = [compiler, *SANITIZE, *how, *map(str, objects), "-o", str(program), "-lpthread"]
    subprocess.run(link, check=True)
    classes = tmp_path / "classes.bin"
    classes.write_bytes(zlib.decompress(base64.b85decode(RUNS)))
    runs = os.environ.get("LMFAST_FUZZ_RUNS", "300")
    result = subprocess.run(
        [str(program), f"-runs={runs}", f"-seed={os.environ.get('LMFAST_FUZZ_SEED', '1')}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "LMFAST_FUZZ_CLASSES": str(classes)},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"Done {runs} runs" in result.stderr
