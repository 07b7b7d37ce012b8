"""The operators on one NVIDIA GPU: bytes or operations per second beside eager and torch.compile.

    python benchmarks/bench_gpu.py [--out benchmarks/results/gpu.json] [--filter rope]

Every number is the median time of one call inside a CUDA graph that walks through copies of the
operands, three times the L2 cache together, so that no operand is found there. The variants of a
case are measured in turns. Share: of the rate of a large device-to-device copy, bytes read plus
bytes written, measured in the same process. Bytes are the fewest the operator can move. ``call``
is the time the host needs per eager call, without a graph: what counts in decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfast
from lmfast._dispatch import ops

ROUNDS = 15
GPU_BACKENDS = ("cuda", "triton")


@dataclass
class Case:
    """One operator at one size.

    Attributes:
        make: fresh operands; differentiable ones require a gradient.
        variants: name -> function of the operands.
        moved: fewest bytes one call reads and writes.
        flops: fewest operations on the matrix units, where those are the floor.
        backward: the gradients for random output gradients are part of the call.
    """

    name: str
    make: Callable[[], tuple[Any, ...]]
    variants: dict[str, Callable[..., Any]]
    moved: int
    backward: bool = False
    call_time: bool = False
    flops: int = 0


def our_variants(op: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """``function(*operands, backend=...)`` on every GPU backend that is there."""
    found = {}
    for backend in GPU_BACKENDS:
        if backend not in ops()[op].implementations:
            continue
        if backend == "cuda" and not lmfast._extension.cuda.loaded:
            continue
        found[backend] = lambda *a, b=backend: function(*a, backend=b)
    return found


def with_peers(
    op: str, function: Callable[..., Any], eager: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    return {
        **our_variants(op, function),
        "eager": eager,
        "compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }


def operand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def norm_cases() -> Iterator[Case]:
    def eager_add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return F.rms_norm(total, w.shape, w, 1e-6), total

    for rows, width in ((1, 4096), (64, 4096), (32768, 1024), (16384, 4096), (8192, 8192)):
        size = rows * width * 2
        for grad in (False, True) if rows > 64 else (False,):
            kind = "fwd+bwd" if grad else "fwd"
            yield Case(
                f"rms_norm {kind} {rows}x{width}",
                lambda r=rows, w=width, g=grad: (operand(r, w, grad=g), operand(w, grad=g)),
                with_peers(
                    "rms_norm",
                    lambda x, w, backend: lmfast.ops.rms_norm(x, w, backend=backend),
                    lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
                ),
                moved=size * (2 + 3 * grad),
                backward=grad,
                call_time=rows == 1,
            )
            yield Case(
                f"add_rms_norm {kind} {rows}x{width}",
                lambda r=rows, w=width, g=grad: (
                    operand(r, w, grad=g),
                    operand(r, w, grad=g),
                    operand(w, grad=g),
                ),
                with_peers(
                    "add_rms_norm",
                    lambda x, r, w, backend: lmfast.ops.add_rms_norm(x, r, w, backend=backend),
                    eager_add,
                ),
                moved=size * (4 + 4 * grad),
                backward=grad,
                call_time=rows == 1,
            )
    yield Case(
        "rms_norm fwd per head 8x32x4096x128",
        lambda: (operand(8, 4096, 32, 128).transpose(1, 2), operand(128)),
        with_peers(
            "rms_norm",
            lambda x, w, backend: lmfast.ops.rms_norm(x, w, backend=backend),
            lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        ),
        moved=8 * 32 * 4096 * 128 * 2 * 2,
    )


def rope_cases() -> Iterator[Case]:
    reference = ops()["rope"].reference
    for batch, heads, kv_heads, length in ((1, 32, 8, 1), (64, 32, 8, 1), (4, 32, 8, 4096)):
        for interleaved in (False, True):
            for grad in (False, True) if length > 1 else (False,):
                style = "interleaved" if interleaved else "half"
                kind = "fwd+bwd" if grad else "fwd"

                def make(
                    b: int = batch,
                    h: int = heads,
                    k: int = kv_heads,
                    t: int = length,
                    g: bool = grad,
                ) -> tuple[Any, ...]:
                    query = operand(b, t, h, 128).transpose(1, 2).requires_grad_(g)
                    key = operand(b, t, k, 128).transpose(1, 2).requires_grad_(g)
                    return query, key, *lmfast.ops.rope_tables(8192, 128, device="cuda")

                yield Case(
                    f"rope {style} {kind} {batch}x{heads}/{kv_heads}x{length}x128",
                    make,
                    with_peers(
                        "rope",
                        lambda q, k, c, s, backend, i=interleaved: lmfast.ops.rope(
                            q, k, c, s, interleaved=i, positions=7, backend=backend
                        ),
                        lambda q, k, c, s, i=interleaved: reference(q, k, c, s, None, 7, i, False),
                    ),
                    moved=batch * (heads + kv_heads) * length * 128 * 2 * 2 * (1 + grad),
                    backward=grad,
                    call_time=batch == 1 and length == 1,
                )


def attention_cases() -> Iterator[Case]:
    def variants(causal: bool) -> dict[str, Callable[..., Any]]:
        return {
            **our_variants(
                "attention",
                lambda q, k, v, backend: lmfast.ops.attention(q, k, v, backend=backend),
            ),
            "eager": lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            ),
        }

    for head_dim in (64, 128):
        for grad in (False, True):
            shape = (4, 16, 4096, head_dim)
            yield Case(
                f"attention causal {'fwd+bwd' if grad else 'fwd'} {'x'.join(map(str, shape))}",
                lambda s=shape, g=grad: tuple(operand(*s, grad=g) for _ in range(3)),
                variants(True),
                moved=4 * 4 * 16 * 4096 * head_dim * 2,
                flops=2 * 4 * 16 * 4096**2 * head_dim * (7 if grad else 2) // 2,
                backward=grad,
            )
    for batch, keys in ((1, 8192), (32, 8192), (8, 65536)):
        yield Case(
            f"attention decode {batch}x32/8x{keys}x128",
            lambda b=batch, s=keys: (
                operand(b, 32, 1, 128),
                operand(b, 8, s, 128),
                operand(b, 8, s, 128),
            ),
            variants(False),
            moved=2 * batch * 8 * keys * 128 * 2,
            call_time=batch == 1,
        )


CASES = (norm_cases, rope_cases, attention_cases)


def run_once(case: Case, variant: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    outputs = variant(*operands)
    if not case.backward:
        return outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in operands if t.requires_grad]
    # The output stands in for its gradient: same shape and layout, and no extra bytes to make one.
    return torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])


def graph_of(case: Case, variant: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Any:
    side = torch.cuda.Stream()
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


def measure(case: Case, copy: float, l2: int) -> dict[str, Any]:
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
        if case.call_time:
            found["call_us"] = call_time(case, case.variants[name], sets[0]) * 1e6
        row["variants"][name] = found
    return row


def show(row: dict[str, Any]) -> None:
    cells = []
    for name, found in row["variants"].items():
        if "error" in found:
            cells.append(f"{name} failed: {found['error'][:60]}")
            continue
        text = f"{name} {found['us']:.1f} us {100 * found['share_of_copy']:.0f}%"
        if "tflop_per_s" in found:
            text = f"{name} {found['us']:.1f} us {found['tflop_per_s']:.0f} TFLOP/s"
        cells.append(text + (f" call {found['call_us']:.1f} us" if "call_us" in found else ""))
    print(f"{row['case']:<44} " + " | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use")
    properties = torch.cuda.get_device_properties(0)
    copy = copy_rate()
    report: dict[str, Any] = {
        "device": properties.name,
        "torch": torch.__version__,
        "copy_gb_per_s": copy / 1e9,
        "l2_bytes": properties.L2_cache_size,
        "backends": {op: list(ops()[op].implementations) for op in ops()},
        "rows": [],
    }
    print(f"{properties.name}, torch {torch.__version__}, copy {copy / 1e9:.0f} GB/s")
    for cases in CASES:
        for case in cases():
            if options.filter not in case.name:
                continue
            row = measure(case, copy, properties.L2_cache_size)
            show(row)
            report["rows"].append(row)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            torch._dynamo.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
