"""`lmfast bench`: the operators against plain PyTorch, on this machine, now."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfast
from lmfast import ops
from lmfast._table import format_table
from lmfast.commands.options import (
    COUNT,
    add_machine_options,
    apply_machine_options,
    output_file,
)
from lmfast.commands.timing import interleaved_medians

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Inputs that need a gradient, our function of them, the plain PyTorch one, and its name.
Case = tuple[list[Tensor], Callable[..., Any], Callable[..., Any], str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Time operators against the same in plain PyTorch: in turns, in one process, medians. "
        "Both sides run under lmfast.tune_allocator()."
    )
    parser.add_argument("op", nargs="*", help=f"of {', '.join(_CASES)}; all if not given")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="fp32", help="of the inputs")
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument(
        "--repeats", type=COUNT, default=9, metavar="N", help="timed runs of each side"
    )
    parser.add_argument(
        "--scale", type=COUNT, default=1, metavar="N", help="divide the number of rows by this"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the figures there as well"
    )
    add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print one line per operator."""
    device = apply_machine_options(options)
    unknown = [name for name in options.op if name not in _CASES]
    if unknown:
        raise ValueError(f"no benchmark named {unknown[0]!r}; there are {', '.join(_CASES)}")
    lmfast.tune_allocator()
    dtype = _DTYPES[options.dtype]
    lines = [["operator", "shape", "baseline", "baseline ms", "lmfast ms", "ratio"]]
    figures = []
    for name in options.op or _CASES:
        torch.manual_seed(0)
        inputs, ours, theirs, baseline = _CASES[name](dtype, device, options.scale)
        calls = [_call(function, inputs, options.backward) for function in (ours, theirs)]
        mine, other = interleaved_medians(*calls, repeats=options.repeats, device=device)
        shape = "x".join(str(size) for size in inputs[0].shape)
        cells = [name, shape, baseline, f"{other * 1e3:.2f}", f"{mine * 1e3:.2f}"]
        lines.append([*cells, f"{other / mine:.2f}x"])
        figures.append(
            {
                "op": name,
                "shape": shape,
                "dtype": options.dtype,
                "backward": options.backward,
                "baseline": baseline,
                "baseline_ms": other * 1e3,
                "lmfast_ms": mine * 1e3,
            }
        )
    print(format_table(lines))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _call(function: Callable[..., Any], inputs: list[Tensor], backward: bool) -> Callable[[], None]:
    if not backward:
        plain = [t.detach() for t in inputs]

        def forward() -> None:
            with torch.no_grad():
                function(*plain)

        return forward
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with torch.no_grad():
        example = function(*leaves)
    outputs = example if isinstance(example, tuple) else (example,)
    gradients = [torch.randn_like(t) for t in outputs]

    def forward_and_backward() -> None:
        result = function(*leaves)
        results = result if isinstance(result, tuple) else (result,)
        torch.autograd.grad(results, leaves, gradients)

    return forward_and_backward


def _rms_norm(dtype: torch.dtype, device: torch.device, scale: int) -> Case:
    x = torch.randn(max(4096 // scale, 1), 2048, dtype=dtype, device=device)
    weight = torch.ones(2048, dtype=dtype, device=device)
    return (
        [x, weight],
        lambda x, w: ops.rms_norm(x, w, 1e-6),
        lambda x, w: F.rms_norm(x, (2048,), w, 1e-6),
        "F.rms_norm",
    )


def _add_rms_norm(dtype: torch.dtype, device: torch.device, scale: int) -> Case:
    (x, weight), *_ = _rms_norm(dtype, device, scale)

    def eager(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (2048,), w, 1e-6), total

    return (
        [x, torch.randn_like(x), weight],
        lambda x, residual, w: ops.add_rms_norm(x, residual, w, 1e-6),
        eager,
        "add, F.rms_norm",
    )


def _rope(dtype: torch.dtype, device: torch.device, scale: int) -> Case:
    steps, dim = max(1024 // scale, 1), 64
    q, k = (torch.randn(4, 16, steps, dim, dtype=dtype, device=device) for _ in range(2))
    cos, sin = ops.rope_tables(steps, dim, device=device)
    wide_cos, wide_sin = (torch.cat((t, t), -1).to(dtype) for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        return torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)

    return (
        [q, k],
        lambda q, k: ops.rope(q, k, cos, sin, interleaved=False),
        lambda q, k: (
            q * wide_cos + turned(q) * wide_sin,
            k * wide_cos + turned(k) * wide_sin,
        ),
        "cat and multiply",
    )


def _linear_cross_entropy(dtype: torch.dtype, device: torch.device, scale: int) -> Case:
    rows, width, vocabulary = max(3712 // scale, 1), 128, max(32011 // scale, 2)
    hidden = torch.randn(rows, width, dtype=dtype, device=device)
    weight = torch.randn(vocabulary, width, dtype=dtype, device=device) * 0.05
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    return (
        [hidden, weight],
        lambda h, w: ops.linear_cross_entropy(h, w, targets),
        lambda h, w: F.cross_entropy((h @ w.t()).float(), targets),
        "F.cross_entropy(h W^T)",
    )


_CASES = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "linear_cross_entropy": _linear_cross_entropy,
}
