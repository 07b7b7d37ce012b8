"""The engine, its fuzz target and its Python module under AddressSanitizer and
UndefinedBehaviorSanitizer."""

from __future__ import annotations

import base64
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizer_support import needs_engine

from lmfast.tokenizer.unicode_classes import RUNS

ROOT = Path(__file__).parents[1]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FUZZER = ["-fsanitize=fuzzer", "-DLIBFUZZER"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt", "-maes"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "cd", "vbmi", "vbmi2"))]
# What knows Python; the engine itself knows neither Python nor torch.
BINDING = ("bind", "python_text")


def compiles(command: list[str], folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text(
        "#include <cstddef>\n#include <cstdint>\n"
        'extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }\n'
        "#ifndef LIBFUZZER\nint main() {}\n#endif\n"
    )
    command = [*command, str(probe), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Toolchain:
    """A compiler with the sanitizers, and the objects it has made so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def compiler(self) -> str:
        found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if found is None:
            pytest.skip("no C++ compiler")
        if not compiles([found, *SANITIZE], self.folder):
            pytest.skip(f"{found} has no sanitizers")
        return found

    def compile(
        self, sources: Iterable[Path], *flags: str, compiler: str | None = None
    ) -> list[str]:
        """Objects of the sources, made once for each set of flags."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        used = compiler or self.compiler
        folder = self.folder / str(abs(hash((used, flags))))
        folder.mkdir(exist_ok=True)

        def compile_one(source: Path) -> str:
            target = folder / f"{source.stem}.o"
            level = AVX512 if source.stem.endswith("_avx512") else AVX2
            own = level if x86 and source.stem.endswith(("_avx512", "_avx2")) else []
            if not target.exists():
                subprocess.run(
                    [used, "-std=c++17", "-w", "-fPIC", *SANITIZE, *flags, *own]
                    + [f"-I{ROOT / 'csrc' / 'bpe'}", "-c", str(source), "-o", str(target)],
                    check=True,
                )
            return str(target)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile_one, sources))


@pytest.fixture(scope="module")
def toolchain(tmp_path_factory: pytest.TempPathFactory) -> Toolchain:
    return Toolchain(tmp_path_factory.mktemp("sanitizers"))


def engine_sources(*, binding: bool) -> list[Path]:
    sources = sorted((ROOT / "csrc" / "bpe").glob("*.cpp"))
    return [source for source in sources if source.name.startswith(BINDING) == binding]


def test_fuzz_target_under_sanitizers(tmp_path, toolchain):
    """The target by libFuzzer where clang has it, else by its own driver."""
    sources = [ROOT / "tests" / "fuzz" / "bpe_fuzz.cpp"]
    clang = shutil.which("clang++")
    if clang and compiles([clang, *SANITIZE, *FUZZER], tmp_path):
        compiler, flags, how = clang, ["-fsanitize=fuzzer-no-link"], FUZZER[:1]
    else:
        compiler, flags, how = toolchain.compiler, [], []
        sources.append(ROOT / "tests" / "fuzz" / "driver.cpp")
    sources += engine_sources(binding=False)
    objects = toolchain.compile(sources, "-O1", *flags, compiler=compiler)
    program = tmp_path / "bpe_fuzz"
    link = [compiler, *SANITIZE, *how, *objects, "-o", str(program), "-lpthread"]
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


@needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is preloaded as on Linux")
def test_python_module_under_sanitizers(tmp_path, toolchain):
    """The module in a process into which the sanitizers' runtime is preloaded."""
    pybind11 = pytest.importorskip("pybind11")
    # The C++ runtime too: exceptions are intercepted where it is known from the start.
    preload = [
        subprocess.run(
            [toolchain.compiler, f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(os.path.isabs(path) and os.path.exists(path) for path in preload):
        pytest.skip(f"{toolchain.compiler} does not bring the sanitizers as shared libraries")
    include = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    objects = toolchain.compile(engine_sources(binding=False), "-O1")
    objects += toolchain.compile(
        engine_sources(binding=True), "-O0", "-fvisibility=hidden", *(f"-I{i}" for i in include)
    )
    module = tmp_path / f"_bpe{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [toolchain.compiler, *SANITIZE, "-shared", *objects, "-o", str(module), "-lpthread"]
    subprocess.run(link, check=True)
    path = [str(tmp_path), str(ROOT), str(Path(__file__).parent), *sys.path]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tokenizer_calls.py")), json.dumps(path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preload),
            # Python itself keeps memory until it ends.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "PYTHONMALLOC": "malloc",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    from tokenizer_calls import answers

    assert f"the answers of {module}: {answers()}" in result.stdout
