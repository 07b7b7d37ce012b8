"""Builds the compiled modules through CMake, and installs without them when that fails.

Never imports torch and never touches the network: only torch's headers are needed, and those are
found beside the interpreter, in isolated builds too. Settings, all environment variables:

    LMFAST_BUILD        auto (default) | cpu (no CUDA) | cuda (CUDA must build) | none
    LMFAST_REQUIRE_EXT  1: a module that cannot be built is an error, not a warning
    LMFAST_TORCH_ROOT   the torch package folder, when it is not where Python finds it
    LMFAST_CUDA_ARCHS   GPU architectures, default "80;86;89;90a"
    MAX_JOBS            parallel compilers, default min(cores, 4)
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
REPORT = "_build_report.json"


TITLE = "installed without some compiled modules"
STILL_WORKS = (
    "What still works: everything but Generator's bf16, int8 and int4 weights, through",
    "PyTorch and Python, more slowly.",
    "`python -m lmfast info` shows this again; LMFAST_REQUIRE_EXT=1 makes it an error.",
)


class Unavailable(Exception):
    """Why a module cannot be built here, in words for the user."""


def find_package(name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    if (spec := importlib.util.find_spec(name)) and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    folder = Path(sysconfig.get_path("platlib")) / name
    return folder if folder.is_dir() else None


def find_tool(name: str) -> str | None:
    """A program on the path or beside the interpreter (where pip puts cmake and ninja)."""
    folders = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    return shutil.which(name, path=os.pathsep.join(folders))


def find_torch() -> tuple[Path, str | None]:
    """(folder, CUDA version or None) of the torch to build against."""
    override = os.environ.get("LMFAST_TORCH_ROOT")
    root = Path(override) if override else find_package("torch")
    if root is None or not (root / "include/torch/csrc/stable/library.h").exists():
        raise Unavailable(
            "torch's headers were not found: install torch first "
            "(pip install torch), or set LMFAST_TORCH_ROOT to its package folder"
        )
    text = (root / "version.py").read_text()
    version = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    if version is None or tuple(map(int, version.groups())) < MINIMUM_TORCH:
        raise Unavailable(f"torch {'.'.join(map(str, MINIMUM_TORCH))} or newer is needed")
    cuda = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return root, cuda.group(1) if cuda else None


def cuda_options(mode: str, torch_cuda: str | None) -> list[str]:
    """CMake options that build _cuda, or none with the reason in an exception."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else find_tool("nvcc")
    if mode == "cpu":
        raise Unavailable("LMFAST_BUILD=cpu")
    if torch_cuda is None:
        raise Unavailable("this torch is built without CUDA")
    if nvcc is None:
        raise Unavailable("nvcc was not found (set CUDA_HOME)")
    archs = os.environ.get("LMFAST_CUDA_ARCHS", "80;86;89;90a")
    return [
        "-DLMFAST_BUILD_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DLMFAST_CUDA_ARCHS={archs}",
    ]


def first_error(output: str) -> str | None:
    """The first error that CMake or a compiler printed; CMake's text stands below its heading."""
    lines = output.splitlines()
    first = next((i for i, line in enumerate(lines) if "rror" in line), None)
    if first is None:
        return None
    text = []
    if lines[first].startswith("CMake Error at "):
        below = itertools.takewhile(lambda s: not s or s.startswith("  "), lines[first + 1 :])
        text = [line.strip() for line in below if line]
    return " ".join(text) or lines[first].strip()


class CMakeBuild(build_ext):
    """Runs CMake once for all modules; a failure is reported and survived."""

    def run(self) -> None:
        package = ROOT / "lmfast" if self.inplace else Path(self.build_lib) / "lmfast"
        self.output = package.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.failures: dict[str, str] = {}
        mode = os.environ.get("LMFAST_BUILD", "auto")
        required = os.environ.get("LMFAST_REQUIRE_EXT") == "1"
        if mode not in ("auto", "cpu", "cuda", "none"):
            sys.exit(f"LMFAST_BUILD must be auto, cpu, cuda or none, got {mode!r}")
        for old in [*self.output.glob("_cpu.so"), *self.output.glob("_cuda.so")]:
            old.unlink()
        for old in self.output.glob("_bpe*.so"):
            old.unlink()
        if mode == "none":
            self.failures = dict.fromkeys(("_cpu", "_bpe", "_cuda"), "LMFAST_BUILD=none")
        else:
            self.build_all(mode)
        (self.output / REPORT).write_text(json.dumps(self.failures, indent=2) + "\n")
        needed = {"_cpu", "_bpe"} | ({"_cuda"} if mode == "cuda" else set())
        missing = sorted(needed & self.failures.keys())
        fatal = bool(missing) and (required or mode == "cuda")
        if missing:
            self.print_block(missing, fatal)
        if fatal:
            sys.exit(f"lmfast: {', '.join(missing)} could not be built and must be")

    def build_all(self, mode: str) -> None:
        # A fixed folder for editable installs, so that only what changed is compiled again.
        temp = ROOT / "build" if self.inplace else Path(self.build_temp).resolve()
        build = temp / "cmake"
        options = [
            f"-DLMFAST_OUTPUT_DIR={self.output}",
            f"-DLMFAST_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DLMFAST_EXT_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
        ]
        torch_cuda = None
        try:
            root, torch_cuda = find_torch()
            options.append(f"-DLMFAST_TORCH_ROOT={root}")
        except Unavailable as reason:
            options.append("-DLMFAST_BUILD_CPU=OFF")
            self.failures["_cpu"] = str(reason)
        if (pybind11 := find_package("pybind11")) is not None:
            options.append(f"-DLMFAST_PYBIND11_INCLUDE={pybind11 / 'include'}")
        else:
            options.append("-DLMFAST_BUILD_BPE=OFF")
            self.failures["_bpe"] = "pybind11 was not found (pip install pybind11)"
        try:
            gpu = cuda_options(mode, torch_cuda)
        except Unavailable as reason:
            gpu = []
            self.failures["_cuda"] = str(reason)
        try:
            cmake = find_tool("cmake")
            if cmake is None:
                raise Unavailable("cmake was not found (pip install cmake ninja)")
            try:
                self.configure(cmake, build, [*options, *gpu])
            except Unavailable as reason:
                if not gpu:
                    raise
                # A CUDA toolkit that does not work must not cost the CPU modules.
                gpu = []
                self.failures["_cuda"] = str(reason)
                self.configure(cmake, build, options)
        except Unavailable as reason:
            for name in ("_cpu", "_bpe", "_cuda"):
                self.failures.setdefault(name, str(reason))
            return
        for name in ("_cpu", "_bpe", "_cuda"):
            if name not in self.failures:
                self.build_target(cmake, build, name)

    def configure(self, cmake: str, build: Path, options: list[str]) -> None:
        build.mkdir(parents=True, exist_ok=True)
        for stale in (build / "CMakeCache.txt", build / "build.ninja", build / "Makefile"):
            stale.unlink(missing_ok=True)
        command = [cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        if (ninja := find_tool("ninja")) is not None:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self.call([*command, *options], build / "configure.log", "CMake cannot configure")

    def build_target(self, cmake: str, build: Path, name: str) -> None:
        jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 4))
        command = [cmake, "--build", str(build), "--target", name, "-j", jobs]
        try:
            self.call(command, build / f"{name}.log", "the compiler failed")
        except Unavailable as reason:
            self.failures[name] = str(reason)

    def call(self, command: list[str], log: Path, what: str) -> None:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
        except OSError as error:
            raise Unavailable(f"{what}: {error}") from error
        log.write_text(done.stdout)
        if done.returncode != 0:
            first = first_error(done.stdout) or f"exit status {done.returncode}"
            raise Unavailable(f"{what}: {first} (see {log})")

    def print_block(self, missing: list[str], fatal: bool) -> None:
        title = "some compiled modules could not be built"
        lines = ["", "=" * 78, f"lmfast: {title if fatal else TITLE}", ""]
        lines += [f"  {name}: {self.failures[name]}" for name in missing]
        lines += [""] if fatal else ["", *STILL_WORKS]
        print("\n".join([*lines, "=" * 78, ""]), file=sys.stderr)

    def get_source_files(self) -> list[str]:
        """What a source distribution holds besides the package: all to build and to test it."""
        single = ("CMakeLists.txt", "Makefile", "constraints.txt", "CHANGELOG.md", ".clang-format")
        found = [ROOT / name for name in single]
        kinds = ("py", "cpp", "h", "cu", "cuh", "sh", "json", "md")
        for folder in ("csrc", "tests", "benchmarks"):
            for kind in kinds:
                found += (ROOT / folder).rglob(f"*.{kind}")
        return sorted(str(path.relative_to(ROOT)) for path in found if path.is_file())

    def get_outputs(self) -> list[str]:
        return [str(p) for p in self.output.glob("_*.so")] if hasattr(self, "output") else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # One placeholder makes the wheel platform-specific and calls build_ext.
    ext_modules=[Extension("lmfast._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
