"""`lmfast profile`: where the time of training or generation goes, and how far the machine is."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import lmfast
from lmfast._table import format_table
from lmfast.commands.options import (
    COUNT,
    add_machine_options,
    apply_machine_options,
    output_file,
)
from lmfast.commands.profile_measure import (
    Ceilings,
    LayerTimes,
    launches,
    measured_ceilings,
    seconds_of,
    synchronize,
)
from lmfast.commands.profile_model import ProfiledModel, profiled_model
from lmfast.commands.profile_work import Work
from lmfast.commands.typed import refuse_typed
from lmfast.training.memory import peak_bytes, peak_device_bytes

_SIZES = {"vocab_size": 32_011, "emb_dim": 128, "layers": 2, "heads": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Run training steps or generation on random ids and print tokens per second, arithmetic "
        "and bytes per second beside what this machine reaches at most, peak memory, launches, "
        "and time, bytes and arithmetic of each part, layer and operation."
    )
    parser.add_argument(
        "--model", metavar="DIR", help="a saved model, of this package or transformers; else --kind"
    )
    parser.add_argument(
        "--kind", choices=["decoder", "recurrent"], default="decoder", help="of a new model"
    )
    parser.add_argument(
        "--mode", choices=["training", "generation"], default="training", help="what to run"
    )
    for name, value in _SIZES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=COUNT,
            default=value,
            metavar="N",
            help=f"of a new {'decoder' if name == 'heads' else 'model'}",
        )
    parser.add_argument(
        "--batch-size", type=COUNT, metavar="N", help="rows (default: 128, in generation 1)"
    )
    parser.add_argument(
        "--context", type=COUNT, default=29, metavar="N", help="tokens per row, or of a prompt"
    )
    parser.add_argument(
        "--new-tokens", type=COUNT, default=64, metavar="N", help="generated per row"
    )
    parser.add_argument(
        "--steps", type=COUNT, default=5, metavar="N", help="timed, after one to warm up"
    )
    parser.add_argument("--top", type=COUNT, default=12, metavar="N", help="operations to list")
    parser.add_argument(
        "--depth", type=COUNT, default=3, metavar="N", help="of nested layers to list"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the figures there as well"
    )
    parser.add_argument(
        "--trace",
        type=output_file,
        metavar="FILE",
        help="write a trace for chrome://tracing or Perfetto",
    )
    add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Profile and print."""
    if options.model is not None:
        names = ["kind", *_SIZES]
        refuse_typed(options, names, f"is of a new model: leave it out, or --model {options.model}")
    elif options.kind == "recurrent":
        refuse_typed(options, ["heads"], "is for --kind decoder, not recurrent: leave it out")
    if options.mode == "training":
        refuse_typed(options, ["new_tokens"], "is for --mode generation")
    device = apply_machine_options(options)
    lmfast.tune_allocator()
    model = profiled_model(options, device)
    training = options.mode == "training"
    model.module.train(training)
    torch.manual_seed(0)
    batch = options.batch_size or (128 if training else 1)
    shape = (batch, options.context)
    print(
        f"{model.name} of {model.parameters():,} parameters, {options.mode} of "
        f"{batch} x {options.context} tokens\n"
    )
    figures: dict[str, Any] = {
        "model": model.name,
        "parameters": model.parameters(),
        "mode": options.mode,
        "batch_size": batch,
        "context": options.context,
    }
    measure = _training if training else _generation
    figures |= measure(model, shape, options, device)
    call, forward = figures.pop("call"), figures.pop("forward")
    figures["peak_memory_bytes"] = peak_device_bytes() if device.type == "cuda" else peak_bytes()
    ceilings = measured_ceilings(device, model.output.dtype)
    figures["ceilings"] = {
        "bytes_per_second": ceilings.bytes_per_second,
        "flops_per_second": ceilings.flops_per_second,
    }
    _print_rates(figures, ceilings)
    layers, work = LayerTimes(options.depth, device), Work()
    with layers.recording(model.module):
        call()
        if not layers.rows():  # the engine, or a graph, runs them all at once
            forward()
    with work.by_layer(model.module, options.depth), work:
        call()
    found = work
    if layers.rows() and not work.layer_bytes:
        found = Work()
        with found.by_layer(model.module, options.depth), found, torch.no_grad():
            forward()
    figures["layers"] = [
        {
            "layer": name,
            "calls": calls,
            "milliseconds": 1e3 * seconds,
            **rates(found.layer_bytes[name] / calls, found.layer_flops[name] / calls, seconds),
        }
        for name, calls, seconds in layers.rows()
    ]
    _print_layers(figures["layers"], ceilings)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    else:  # PyTorch 2.13 says where the profiler starts and stops, above the level of its errors
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # One cycle, and PyTorch 2.11 warns of what it would clear after one.
    with profile(activities=activities, acc_events=True) as recorded:
        call()
        synchronize(device)
    operators, kernels = launches(recorded.events())
    figures["operator_calls"], figures["kernel_launches"] = operators, kernels
    figures["operations"] = operations(recorded.key_averages(), work, device)[: options.top]
    _print_operations(figures["operations"], ceilings)
    started = f", {kernels:,} kernels started" if device.type == "cuda" else ""
    what = "a training step" if training else f"{options.new_tokens} steps"
    print(f"\n{what}: {operators:,} operators called{started}")
    if options.trace is not None:
        recorded.export_chrome_trace(options.trace)
        print(f"trace written to {options.trace}")
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _training(
    model: ProfiledModel,
    shape: tuple[int, int],
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    inputs, targets = (torch.randint(0, model.vocab_size, shape, device=device) for _ in range(2))
    optimizer = torch.optim.AdamW(model.module.parameters(), fused=True)
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimiser": []}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = _timed(parts["forward"], device, lambda: model.loss(inputs, targets))
        _timed(parts["backward"], device, loss.backward)
        _timed(parts["optimiser"], device, optimizer.step)

    for _ in range(options.steps + 1):
        step()
    medians = {name: statistics.median(seconds[1:]) for name, seconds in parts.items()}
    tokens = shape[0] * shape[1]
    # Backward has two products for each one forward.
    flops = 3 * model.flops_per_token(options.context) * tokens
    return _figures(medians, tokens, flops, model.training_bytes()) | {
        "call": step,
        "forward": lambda: model.module(inputs),
    }


def _generation(
    model: ProfiledModel,
    shape: tuple[int, int],
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    ids = torch.randint(0, model.vocab_size, shape, device=device)
    times: dict[int, list[float]] = {1: [], options.new_tokens + 1: []}

    def generate(new_tokens: int) -> Any:
        with torch.no_grad():
            return model.generate(ids, new_tokens)

    for _ in range(options.steps + 1):
        for new_tokens, seconds in times.items():
            seconds.append(seconds_of(partial(generate, new_tokens), device))
    first, whole = (statistics.median(seconds[1:]) for seconds in times.values())
    per_step = max(whole - first, 1e-9) / options.new_tokens
    flops, moved = model.decoding_work(shape[0], options.context + options.new_tokens / 2)
    found = _figures({"prompt": first, "token": per_step}, shape[0], flops, moved, per_step)
    return found | {
        "new_tokens": options.new_tokens,
        "call": lambda: generate(options.new_tokens),
        "forward": lambda: model.module(ids),
    }


def _figures(
    parts: dict[str, float], tokens: int, flops: float, moved: float, seconds: float | None = None
) -> dict[str, Any]:
    """Rates of ``tokens`` in ``seconds``, by default the parts' sum."""
    seconds = sum(parts.values()) if seconds is None else seconds
    return {
        "milliseconds": {name: 1e3 * s for name, s in parts.items()},
        "tokens_per_second": tokens / seconds,
        "gflop_per_second": flops / seconds / 1e9,
        "gb_per_second": moved / seconds / 1e9,
    }


def _timed(seconds: list[float], device: torch.device, call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = call()
    synchronize(device)
    seconds.append(time.perf_counter() - started)
    return result


def _print_rates(figures: dict[str, Any], ceilings: Ceilings) -> None:
    parts = figures["milliseconds"]
    total = sum(parts.values())
    rows = [["part", "ms", "share"]]
    if figures["mode"] == "training":
        rows += [[n, f"{ms:.1f}", f"{ms / total:.0%}"] for n, ms in parts.items()]
        rows.append(["step", f"{total:.1f}", "100%"])
    else:
        rows += [[n, f"{ms:.3f}", ""] for n, ms in parts.items()]
    print(format_table(rows))
    flops, moved = figures["gflop_per_second"], figures["gb_per_second"]
    print(
        f"\n{figures['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {figures['peak_memory_bytes'] / 1e6:,.0f} MB\n"
        f"{flops:,.1f} GFLOP/s, {flops * 1e9 / ceilings.flops_per_second:.0%} of the "
        f"{ceilings.flops_per_second / 1e9:,.0f} of a large matrix product\n"
        f"{moved:,.2f} GB/s of parameters and cache, "
        f"{moved * 1e9 / ceilings.bytes_per_second:.0%} of the "
        f"{ceilings.bytes_per_second / 1e9:,.1f} of a large copy\n"
    )


def rates(moved: float, flops: float, seconds: float) -> dict[str, float]:
    """Bytes and operations per second."""
    seconds = max(seconds, 1e-9)
    return {"gb_per_second": moved / seconds / 1e9, "gflop_per_second": flops / seconds / 1e9}


def operations(averages: Any, work: Work, device: torch.device) -> list[dict[str, Any]]:
    """The operators of a profile by their own time, with what `work` counted of each.

    On a GPU, kernels in the place of operators where most were started by a graph, which does not
    say by whom.
    """
    on_gpu = device.type == "cuda"

    def seconds(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    events = [event for event in averages if seconds(event) > 0]
    total = sum(map(seconds, events))
    if on_gpu:
        own = [event for event in events if "::" in event.key and event.self_cpu_time_total > 0]
        others = [event for event in events if event not in own]
        launched, run = (sum(map(seconds, part)) for part in (own, others))
        events, total = (own, launched) if launched > 0.5 * run else (others, run)
    ranked = sorted(events, key=seconds, reverse=True)
    return [
        {
            "operation": event.key,
            "calls": event.count,
            "milliseconds": 1e3 * seconds(event),
            "share": seconds(event) / (total or 1.0),
            **rates(work.bytes[event.key], work.flops[event.key], seconds(event)),
        }
        for event in ranked
    ]


def _cells(row: dict[str, Any], ceilings: Ceilings) -> list[str]:
    """Rates as text, and the larger share of what the machine reaches; nothing counted: a dash."""
    moved, flops = row["gb_per_second"], row["gflop_per_second"]
    share = max(moved * 1e9 / ceilings.bytes_per_second, flops * 1e9 / ceilings.flops_per_second)
    return [
        f"{moved:,.1f}" if moved else "-",
        f"{flops:,.1f}" if flops else "-",
        f"{share:.0%}" if moved or flops else "-",
    ]


_RATES = ["GB/s", "GFLOP/s", "of ceiling"]


def _print_layers(layers: list[dict[str, Any]], ceilings: Ceilings) -> None:
    if not layers:
        return
    rows = [["layer, forward", "calls", "ms each", *_RATES]]
    for r in layers:
        cells = [r["layer"], str(r["calls"]), f"{r['milliseconds']:.3f}", *_cells(r, ceilings)]
        rows.append(cells)
    print(format_table(rows) + "\n")


def _print_operations(found: list[dict[str, Any]], ceilings: Ceilings) -> None:
    rows = [["operation", "calls", "ms", "share", *_RATES]]
    for r in found:
        cells = [r["operation"][:60], str(r["calls"]), f"{r['milliseconds']:.2f}"]
        rows.append([*cells, f"{r['share']:.0%}", *_cells(r, ceilings)])
    print(format_table(rows))
