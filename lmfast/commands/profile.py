"""`lmfast profile`: where the time of a training step goes."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import lmfast
from lmfast._table import format_table
from lmfast.commands.options import COUNT, add_machine_options, apply_machine_options
from lmfast.models import DecoderLanguageModel, LanguageModel, RecurrentLanguageModel
from lmfast.training import load_model
from lmfast.training.memory import peak_bytes, peak_device_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Run training steps on random ids and print the time of each part, tokens per second, "
        "arithmetic per second, peak memory, and the operations that take longest."
    )
    parser.add_argument("--model", metavar="DIR", help="a saved model; else one of --kind")
    parser.add_argument(
        "--kind", choices=["decoder", "recurrent"], default="decoder", help="of a new model"
    )
    parser.add_argument(
        "--vocab-size", type=COUNT, default=32_011, metavar="N", help="of a new model"
    )
    parser.add_argument("--emb-dim", type=COUNT, default=128, metavar="N", help="of a new model")
    parser.add_argument("--layers", type=COUNT, default=2, metavar="N", help="of a new model")
    parser.add_argument("--heads", type=COUNT, default=8, metavar="N", help="of a new decoder")
    parser.add_argument("--batch-size", type=COUNT, default=128, metavar="N", help="rows")
    parser.add_argument("--context", type=COUNT, default=29, metavar="N", help="tokens per row")
    parser.add_argument(
        "--steps", type=COUNT, default=5, metavar="N", help="timed, after one to warm up"
    )
    parser.add_argument("--top", type=COUNT, default=12, metavar="N", help="operations to list")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Profile and print."""
    device = apply_machine_options(options)
    lmfast.tune_allocator()
    model = _model(options).to(device)
    torch.manual_seed(0)
    shape = (options.batch_size, options.context)
    inputs, targets = (torch.randint(0, model.vocab_size, shape, device=device) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimiser": []}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = _timed(parts["forward"], device, lambda: model.loss(inputs, targets))
        _timed(parts["backward"], device, loss.backward)
        _timed(parts["optimiser"], device, optimizer.step)

    for _ in range(options.steps + 1):
        step()
    medians = {name: statistics.median(seconds[1:]) for name, seconds in parts.items()}
    total = sum(medians.values())
    tokens = options.batch_size * options.context
    figures: dict[str, Any] = {
        "model": model.config,
        "parameters": model.num_parameters(),
        "batch_size": options.batch_size,
        "context": options.context,
        "milliseconds": {name: seconds * 1e3 for name, seconds in medians.items()},
        "tokens_per_second": tokens / total,
        "gflop_per_second": 3 * flops_per_token(model, options.context) * tokens / total / 1e9,
        "peak_memory_bytes": peak_device_bytes() if device.type == "cuda" else peak_bytes(),
    }
    _print(figures, medians, total)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        step()
    _print_operations(recorded.key_averages(), options.top, device)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def flops_per_token(model: LanguageModel, context: int) -> float:
    """Return the floating-point operations of one token's forward pass.

        2 (matrix entries without the embedding, the output matrix included) + 2 T E blocks

    The second term is causal attention: scores and their product with the values over T / 2 keys.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    matrices -= model.embedding.weight.numel()
    if isinstance(model, DecoderLanguageModel) and model.output is None:
        matrices += model.embedding.weight.numel()
    attention = 0
    if isinstance(model, DecoderLanguageModel):
        width = model.options["num_heads"] * model.head_dim
        attention = 2 * context * width * len(model.layers)
    return 2 * matrices + attention


def _model(options: argparse.Namespace) -> LanguageModel:
    if options.model is not None:
        return load_model(options.model)
    if options.kind == "recurrent":
        return RecurrentLanguageModel(options.vocab_size, options.emb_dim, options.layers, None)
    return DecoderLanguageModel(
        options.vocab_size, options.emb_dim, options.heads, options.layers, None
    )


def _timed(seconds: list[float], device: torch.device, call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - started)
    return result


def _print(figures: dict[str, Any], medians: dict[str, float], total: float) -> None:
    print(
        f"{figures['model']['model']} of {figures['parameters']:,} parameters, "
        f"batches of {figures['batch_size']} x {figures['context']} tokens\n"
    )
    rows = [["part", "ms", "share"]]
    for name, seconds in medians.items():
        rows.append([name, f"{seconds * 1e3:.1f}", f"{seconds / total:.0%}"])
    rows.append(["step", f"{total * 1e3:.1f}", "100%"])
    print(format_table(rows))
    print(
        f"\n{figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['gflop_per_second']:,.0f} GFLOP/s (backward counted as two forwards), "
        f"peak memory {figures['peak_memory_bytes'] / 1e6:,.0f} MB\n"
    )


def _print_operations(averages: Any, top: int, device: torch.device) -> None:
    on_gpu = device.type == "cuda"

    def seconds(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    ranked = sorted(averages, key=seconds, reverse=True)
    total = sum(seconds(event) for event in ranked) or 1.0
    rows = [["operation", "calls", "ms", "share"]]
    for event in ranked[:top]:
        share = seconds(event) / total
        rows.append(
            [event.key[:60], str(event.count), f"{seconds(event) * 1e3:.2f}", f"{share:.0%}"]
        )
    print(format_table(rows))
