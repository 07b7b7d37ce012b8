"""Every GPU kernel becomes sm_90 machine code within a Hopper's limits. Needs no GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
SHARED_LIMIT = 227 * 1024
# Kernels whose time is the op's time: spilled registers would add memory traffic to each row.
HOT = {
    "_rms_norm_fwd_kernel",
    "_rms_norm_bwd_kernel",
    "_rope_kernel",
    "_glu_fwd_kernel",
    "_glu_bwd_kernel",
    "_attention_fwd_kernel",
    "_attention_dq_kernel",
    "_attention_dkv_kernel",
    "_cross_entropy_kernel",
    "_rope_append_kernel",
    "_additive_scores_kernel",
    "_additive_grad_kernel",
    "_linear_recurrence_fwd_kernel",
    "_linear_recurrence_bwd_kernel",
}
# A saved predicate or address, outside the loops; arrays that spill take hundreds of bytes.
STACK_LIMIT = 16


@pytest.fixture(scope="module")
def triton_report(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="triton is not installed")
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    program, out = Path(__file__).with_name("triton_aot.py"), folder / "report.json"
    result = subprocess.run(
        [sys.executable, str(program), str(out)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


def test_every_triton_kernel_compiles(triton_report: list[dict[str, Any]]) -> None:
    sources = "".join(p.read_text() for p in (ROOT / "lmfast/triton").glob("*.py"))
    written = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    for dtype in ("float32", "bfloat16", "float16"):
        compiled = {r["kernel"] for r in triton_report if r["case"].startswith(dtype)}
        assert compiled == written, f"{dtype}: {compiled ^ written}"
    assert all(r["cubin"] > 0 for r in triton_report)


def test_triton_kernels_fit(triton_report: list[dict[str, Any]]) -> None:
    for r in triton_report:
        assert r["dynamic_shared"] <= SHARED_LIMIT, r
        assert r["local"] == 0, r
        # Attention in float32 multiplies three times per product, and with every option at once
        # holds a mask besides: neither is what people run, and both still fit the first cache.
        rare = "attention" in r["case"] and ("float32" in r["case"] or "every" in r["case"])
        limit = STACK_LIMIT if r["kernel"] in HOT else 64
        assert r["stack"] <= (256 if rare else limit), r


def _cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", _cuda_sources(), ids=lambda p: p.name)
def test_cuda_source_compiles(source: Path, tmp_path: Path) -> None:
    """Against the headers of any torch, for sm_90a, without a warning and without spills."""
    assert NVCC is not None
    include = Path(torch.__file__).parent / "include"
    command = [
        *(NVCC, "-c", str(source), "-o", str(tmp_path / "out.o"), "-std=c++17", "-O3"),
        *("-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-Werror", "all-warnings"),
        *("-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"),
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-6000:]
    functions = re.findall(r"Function properties for (\S+)\n\s*(.*)", report)
    assert functions, report[-2000:]
    for name, properties in functions:
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes", properties))
        assert (stores, loads) == (0, 0), f"{name} spills: {properties}"
        assert stack <= STACK_LIMIT, f"{name} has an array in local memory: {properties}"
