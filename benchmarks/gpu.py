"""The operators on one NVIDIA GPU: bytes or operations per second beside their peers.

    python -m benchmarks.gpu [--out benchmarks/results/gpu.json] [--filter rope] [--seconds 500]
                             [--choose]

Every number is the median time of one call inside a CUDA graph that walks through copies of the
operands, three times the L2 cache together, so that no operand is found there. The variants of a
case are measured in turns. Share: of the rate of a large device-to-device copy, bytes read plus
bytes written, or of a large bf16 product, both measured in the same process. Bytes and operations
are the fewest the operator can do with. ``call`` is the time the host needs per eager call, without
a graph: what counts in decoding. Peers: eager PyTorch, torch.compile, SDPA's backends, cuDNN's
recurrent layers, and Liger and flash-attn where they are installed. Whole generation, by a CUDA
graph per token and by the loop, comes first; where the time is over, the rest is left out and
counted.

``--choose`` keeps what was measured in ``lmfast/ops/gpu_choices.json``: from then on the automatic
choice on this kind of GPU takes, for calls of the measured classes, the backend that was fastest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_case import GPU_BACKENDS, Case, run_once
from benchmarks.gpu_cases import CASES
from benchmarks.gpu_generation import MODELS, generation_rows
from lmfast import _measured
from lmfast._dispatch import BACKENDS, ops

ROUNDS = 15


def graph_of(case: Case, variant: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Any:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # or targets are read before they are written
    with torch.cuda.stream(side):
        for operands in sets[:2]:
            run_once(case, variant, operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run_once(case, variant, operands) for operands in sets]
    del kept
    return graph


def replay_time(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def call_time(case: Case, variant: Callable[..., Any], operands: tuple[Any, ...]) -> float:
    """Host seconds per eager call: the queue never fills, so this is launching alone."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            run_once(case, variant, operands)
        times.append((time.perf_counter() - start) / 50)
    return statistics.median(times)


def copy_rate() -> float:
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() * 4 / statistics.median(times[2:])


def matmul_rate() -> float:
    """Operations per second of a large bf16 product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[2:])


def call_memory(case: Case, variant: Callable[..., Any], operands: tuple[Any, ...]) -> int:
    """Bytes that one call has allocated at most, beyond its operands."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_once(case, variant, operands)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, copy: float, matmul: float, l2: int) -> dict[str, Any]:
    count = min(64, max(3, -(-3 * l2 // max(1, case.moved))))
    sets = [case.make() for _ in range(count)]
    row: dict[str, Any] = {"case": case.name, "bytes": case.moved, "sets": count, "variants": {}}
    graphs = {}
    for name, variant in case.variants.items():
        try:
            graphs[name] = graph_of(case, variant, sets)
        except Exception as error:
            row["variants"][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_index in range(ROUNDS + 2):
        for name, graph in graphs.items():
            seconds = replay_time(graph, count)
            if round_index >= 2:
                times[name].append(seconds)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        found = {
            "us": median * 1e6,
            "spread": (max(seconds) - min(seconds)) / median,
            "gb_per_s": case.moved / median / 1e9,
            "share_of_copy": case.moved / median / copy,
        }
        if case.flops:
            found["tflop_per_s"] = case.flops / median / 1e12
            found["share_of_matmul"] = case.flops / median / matmul
        if case.memory:
            found["memory_bytes"] = call_memory(case, case.variants[name], sets[0])
        if case.call_time:
            found["call_us"] = call_time(case, case.variants[name], sets[0]) * 1e6
        row["variants"][name] = found
    return row


def class_of(case: Case, backend: str) -> tuple[str, str] | None:
    """(op, class of its arguments) that a case's variant by one of our backends asks about."""
    _measured.asked = []
    try:
        run_once(case, lambda *operands: case.variants[backend](*operands), case.make())
        return _measured.asked[0] if _measured.asked else None
    finally:
        _measured.asked = None


def keep_choice(table: _measured.Table, device: str, case: Case, row: dict[str, Any]) -> None:
    """Enters a measured row: the times of our backends, for the class of the case's calls."""
    times = {
        name: round(found["us"], 2)
        for name, found in row["variants"].items()
        if name in BACKENDS and "us" in found
    }
    if len(times) < 2:
        return  # nothing to choose
    asked = class_of(case, next(iter(times)))
    if asked is not None:
        table.setdefault(device, {})[asked[1]] = times


def plot(report: dict[str, Any], path: Path) -> None:
    """One line per case: every variant's share of the ceiling, ours filled."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed: no {path.name}")
        return
    from matplotlib.figure import Figure

    rows = [r for r in report["rows"] if any("us" in v for v in r["variants"].values())]
    figure = Figure(figsize=(11, 1.5 + 0.24 * len(rows)))
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for r in rows for name in r["variants"]))
    for i, name in enumerate(names):
        ours = name in GPU_BACKENDS
        points = [
            (100 * v.get("share_of_matmul", v["share_of_copy"]), -y)
            for y, r in enumerate(rows)
            if "us" in (v := r["variants"].get(name, {}))
        ]
        if not points:
            continue
        color = f"C{i % 10}"
        axes.scatter(
            *zip(*points, strict=True),
            label=f"lmfast {name}" if ours else name,
            s=40 if ours else 22,
            facecolors=color if ours else "none",
            edgecolors=color,
        )
    axes.set_yticks([-y for y in range(len(rows))], [r["case"] for r in rows], fontsize=7)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "% of a copy's bandwidth, or of a bf16 product's rate where operations are the floor"
    )
    axes.set_title(f"{report['device']}, torch {report['torch']}", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def show(row: dict[str, Any]) -> None:
    cells = []
    for name, found in row["variants"].items():
        if "error" in found:
            cells.append(f"{name} failed: {found['error'][:60]}")
            continue
        text = f"{name} {found['us']:.1f} us {100 * found['share_of_copy']:.0f}%"
        if "tflop_per_s" in found:
            share = 100 * found["share_of_matmul"]
            text = f"{name} {found['us']:.1f} us {found['tflop_per_s']:.0f} TFLOP/s {share:.0f}%"
        if "tokens_per_s" in found:
            text += f" {found['tokens_per_s']:.0f} tokens/s"
        if "memory_bytes" in found:
            text += f" {found['memory_bytes'] / 2**30:.2f} GiB"
        cells.append(text + (f" call {found['call_us']:.1f} us" if "call_us" in found else ""))
    print(f"{row['case']:<44} " + " | ".join(cells), flush=True)


def keep(report: dict[str, Any], row: dict[str, Any], path: Path) -> None:
    """Shows a row and writes the report with it: what was measured stays if the rest fails."""
    show(row)
    report["rows"].append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--seconds", type=float, default=500, help="start no case after this time (default 500)"
    )
    parser.add_argument(
        "--choose", action="store_true", help="let the automatic choice follow the measurements"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use")
    properties = torch.cuda.get_device_properties(0)
    copy, matmul = copy_rate(), matmul_rate()
    report: dict[str, Any] = {
        "device": properties.name,
        "torch": torch.__version__,
        "copy_gb_per_s": copy / 1e9,
        "matmul_tflop_per_s": matmul / 1e12,
        "l2_bytes": properties.L2_cache_size,
        "backends": {op: list(ops()[op].implementations) for op in ops()},
        "rows": [],
    }
    print(
        f"{properties.name}, torch {torch.__version__}, copy {copy / 1e9:.0f} GB/s, "
        f"bf16 product {matmul / 1e12:.0f} TFLOP/s"
    )
    table, kind = _measured.TABLE, _measured.device_kind(torch.device("cuda", 0))
    started = time.perf_counter()
    models = {n: m for n, m in MODELS.items() if options.filter in f"generate {n}"}
    for row in generation_rows(copy, models=models):
        keep(report, row, options.out)
    torch.cuda.empty_cache()
    for cases in CASES:
        for case in cases():
            if options.filter not in case.name:
                continue
            if time.perf_counter() - started > options.seconds:
                report["left_out"] = report.get("left_out", 0) + 1
                continue
            row = measure(case, copy, matmul, properties.L2_cache_size)
            keep(report, row, options.out)
            if options.choose:
                keep_choice(table, kind, case, row)
                _measured.PATH.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    if report.get("left_out"):
        print(f"{report['left_out']} cases left out after {options.seconds:.0f} s")
    plot(report, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
