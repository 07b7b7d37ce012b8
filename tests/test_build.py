"""Installing without a compiler, with a broken one, and what a built module may contain."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from lmfast import _extension

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source tree, not an installed package"
)


def build(base: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build` into `base`, in a process that fails if torch gets imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['setup.py', 'build', '--build-base', {str(base)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
        "sys.exit('setup.py imported torch' if 'torch' in sys.modules else 0)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LMFAST_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def package(base: Path) -> Path:
    return next(base.glob("lib*/lmfast"))


def in_package(base: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=base,
        env={**os.environ, "PYTHONPATH": str(package(base).parent), "LMFAST_REQUIRE_EXT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch, lmfast
assert "main" not in lmfast.__file__.split("lib")[-1]
print(lmfast.info())
x = torch.randn(3, 8, requires_grad=True)
y = lmfast.ops.rms_norm(x, torch.ones(8))
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), torch.ones(8), 1e-6))
print("chosen", lmfast.explain("rms_norm", x))
"""


def broken_tool(folder: Path, name: str) -> str:
    """A PATH on which `name` exists and fails."""
    tool = folder / name
    tool.write_text("#!/bin/sh\necho 'Error: this tool is broken' >&2\nexit 1\n")
    tool.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("case", ["none", "no compiler", "broken cmake"])
def test_installs_and_works_without_extensions(case: str, tmp_path: Path) -> None:
    base = tmp_path / "build"
    environment = {
        "none": {"LMFAST_BUILD": "none"},
        "no compiler": {"CXX": "/nonexistent/c++"},
        "broken cmake": {"PATH": broken_tool(tmp_path, "cmake")},
    }[case]
    done = build(base, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("installed without some compiled modules") == 1
    assert "What still works" in done.stderr
    if case == "no compiler":  # in CMake's words, not where in its files they stand
        assert "environment variable CXX: /nonexistent/c++" in done.stderr
    report = json.loads((package(base) / "_build_report.json").read_text())
    assert {"_cpu", "_bpe"} <= report.keys()
    printed = in_package(base, USE)
    assert f"_cpu: _cpu was not built: {report['_cpu'].splitlines()[0]}" in printed
    assert f"cpu does not run here: _cpu was not built: {report['_cpu'].splitlines()[0]}" in printed
    assert "chosen torch" in printed


@pytest.mark.parametrize("environment", [{"LMFAST_BUILD": "none"}, {"CXX": "/nonexistent/c++"}])
def test_required_extensions_are_fatal(environment: dict[str, str], tmp_path: Path) -> None:
    done = build(tmp_path / "build", LMFAST_REQUIRE_EXT="1", **environment)
    assert done.returncode != 0
    assert "could not be built and must be" in done.stderr
    assert "installed without" not in done.stderr


def test_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"  # the archive's contents are gathered in it
    left_out = (".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*left_out))
    shutil.copy(ROOT / ".clang-format", checkout)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.*")} | {Path("CMakeLists.txt")}
    wanted |= {p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py")}
    wanted |= {p.relative_to(ROOT) for p in (ROOT / "lmfast").rglob("*.md")}
    assert {str(p) for p in wanted} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_unknown_mode_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path / "build", LMFAST_BUILD="fast")
    assert done.returncode != 0
    assert "LMFAST_BUILD must be" in done.stderr


def test_missing_torch_headers_are_explained(tmp_path: Path) -> None:
    done = build(tmp_path / "build", LMFAST_TORCH_ROOT=str(tmp_path), CXX="/nonexistent/c++")
    assert done.returncode == 0
    assert "torch's headers were not found" in done.stderr


def test_ops_pass_their_tests_without_extensions(tmp_path: Path) -> None:
    base = tmp_path / "build"
    assert build(base, LMFAST_BUILD="none").returncode == 0
    files = ["test_rms_norm.py", "test_rope.py", "test_all_ops.py"]
    chosen = "golden or errors or inputs_and or explain or functional"
    code = (
        "import pytest, sys\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {chosen!r}, "
        f"*{[str(ROOT / 'tests' / f) for f in files]!r}]))\n"
    )
    printed = in_package(base, code)
    assert re.search(r"\d+ passed|\[100%\]", printed), printed


def test_sources_ask_for_no_machine_of_their_own() -> None:
    for path in [ROOT / "setup.py", ROOT / "CMakeLists.txt", *ROOT.glob("csrc/**/*.*")]:
        text = path.read_text()
        assert "-march=native" not in text, path
        assert "#pragma omp" not in text, path


def test_modules_name_no_folder_of_the_machine_that_built_them(needs_cpu_kernels: None) -> None:
    assert _extension.cpu.path is not None
    assert os.fsencode(Path(torch.__file__).parent) not in _extension.cpu.path.read_bytes()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_baseline_code_uses_no_wide_registers(needs_cpu_kernels: None) -> None:
    """A machine with AVX2 or less runs everything outside the namespaces of higher levels."""
    assert _extension.cpu.path is not None
    if _extension.available_cpu_isas() == ("default",):
        pytest.skip("not an x86-64 build")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(_extension.cpu.path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    allowed = {"": ("%xmm",), "isa_avx2": ("%xmm", "%ymm")}
    function, seen = "", set()
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:", line):
            function = header.group(1)
            continue
        level = next((n for n in ("isa_avx512", "isa_amx", "isa_avx2") if n in function), "")
        seen.add(level)
        for wide in {"%ymm", "%zmm", "%tmm"} - set(allowed.get(level, ("%ymm", "%zmm", "%tmm"))):
            assert wide not in line, f"{function}: {line}"
    assert {"isa_avx2", "isa_avx512", "isa_amx"} <= seen
