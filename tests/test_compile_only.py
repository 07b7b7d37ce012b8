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
        # With every option at once attention holds a mask besides; in float32 it multiplies three
        # times per product, and the gradients of heads of 256 have no tile without spills. Neither
        # is what people run, and both still fit the first cache.
        limit = STACK_LIMIT
        if "float32 attention backward 512x256" in r["case"]:
            limit = 256
        elif "attention" in r["case"] and "every option" in r["case"]:
            limit = 96
        assert r["stack"] <= limit, r


def _cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


class CudaObjects:
    """Objects of the CUDA sources, each compiled once: for an A100 and for a Hopper."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[Path, tuple[Path, str]] = {}

    def of(self, source: Path) -> tuple[Path, str]:
        """(object file, what the assembler reports)."""
        if source in self._done:
            return self._done[source]
        assert NVCC is not None
        include = Path(torch.__file__).parent / "include"
        target = self._folder / f"{source.stem}.o"
        command = [
            *(NVCC, "-c", str(source), "-o", str(target), "-std=c++17", "-O3", "-t", "2"),
            *("-gencode", "arch=compute_80,code=sm_80"),
            *("-gencode", "arch=compute_90a,code=sm_90a"),
            *("-Xptxas", "-v", "-Werror", "all-warnings"),
            *("-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"),
            *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
            *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        report = result.stdout + result.stderr
        assert result.returncode == 0, report[-6000:]
        self._done[source] = target, report
        return self._done[source]


@pytest.fixture(scope="module")
def cuda_objects(tmp_path_factory: pytest.TempPathFactory) -> CudaObjects:
    if NVCC is None:
        pytest.skip("nvcc is not on the PATH")
    return CudaObjects(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("source", _cuda_sources(), ids=lambda p: p.name)
def test_cuda_source_compiles(source: Path, cuda_objects: CudaObjects) -> None:
    """Against the headers of any torch, without a warning and without spills."""
    _, report = cuda_objects.of(source)
    entry = r"entry function '(\S+)' for '(\w+)'\n.*Function properties for \1\n\s*(.*)"
    functions = re.findall(entry, report)
    assert {arch for _, arch, _ in functions} == {"sm_80", "sm_90a"}, report[-2000:]
    for name, arch, properties in functions:
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes", properties))
        # The kernels are shaped for sm_90a; on sm_80 an address or two may be saved, and the
        # recurrent layers' largest tile, 128 registers of weights, saves some sixty values.
        older = 320 if "recurrent" in name else 48
        assert max(stores, loads) <= (0 if arch == "sm_90a" else older), f"{name}: {properties}"
        limit = STACK_LIMIT if arch == "sm_90a" else max(STACK_LIMIT, older - 32)
        assert stack <= limit, f"{name} has an array in local memory: {properties}"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize(("architecture", "clusters"), [(89, False), (90, True)])
def test_kernels_without_clusters_stop(architecture: int, clusters: bool, tmp_path: Path) -> None:
    """A later GPU translates the code of an earlier one: nothing in it must look like a result."""
    source, target = tmp_path / "kernels.cu", tmp_path / "kernels.ptx"
    source.write_text(
        f'#include "{ROOT}/csrc/cuda/kernels/recurrent_cluster.cuh"\n'
        "namespace lmfast::gpu {\n"
        "template __global__ void recurrent_cluster_fwd_kernel<float, 32, 4>("
        "const __grid_constant__ RecurrentFwd);\n"
        "template __global__ void recurrent_cluster_bwd_kernel<float, 32, 4>("
        "const __grid_constant__ RecurrentBwd);\n}\n"
    )
    command = [NVCC, "-ptx", f"-arch=compute_{architecture}", "-std=c++17", "-o", str(target)]
    subprocess.run([*command, str(source)], check=True)
    bodies = target.read_text().split(".visible .entry ")[1:]
    assert len(bodies) == 2
    for body in bodies:
        assert ("trap;" in body) != clusters
        assert ("barrier.cluster" in body) == clusters


def test_cuda_module_links(cuda_objects: CudaObjects, tmp_path: Path) -> None:
    """Every symbol of the module is in the libraries of a CPU build of torch and the CUDA run
    time, but for the current stream, which only a CUDA build has: its header declares it."""
    assert NVCC is not None
    package = Path(torch.__file__).parent
    include = package / "include"
    stub, library = tmp_path / "stub.c", tmp_path / "libtorch_cuda.so"
    stub.write_text("int aoti_torch_get_current_cuda_stream(int device, void** out) { return 1; }")
    header = include / "torch/csrc/inductor/aoti_torch/c/shim.h"
    assert "aoti_torch_get_current_cuda_stream(" in header.read_text()
    subprocess.run(["gcc", "-shared", "-fPIC", str(stub), "-o", str(library)], check=True)
    sources = [str(p) for p in sorted((ROOT / "csrc/common").glob("*.cpp"))]
    objects = [str(cuda_objects.of(p)[0]) for p in _cuda_sources()]
    command = [
        *(NVCC, "-shared", "-std=c++17", "-O1", "-o", str(tmp_path / "_cuda.so"), *sources),
        *(*objects, "-Xcompiler", "-fPIC", "-Xlinker", "--no-undefined", f"-L{tmp_path}"),
        *(f"-L{package / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_cuda"),
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
