"""The main job in one command: train and compare both models on real text."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmfast
from lmfast.demo.corpus import interpreter_documentation
from lmfast.demo.report import LOSS_TOLERANCE, largest_difference, ratios, table
from lmfast.demo.settings import IMPLEMENTATIONS, MODELS, DemoSettings
from lmfast.demo.worker import Job
from lmfast.tokenizer import BPETokenizer
from lmfast.training import SPECIAL_TOKENS, encode_text, plot_losses, read_text, split_text

__all__ = ["DemoSettings", "run_demo"]


def run_demo(
    out: str | Path, settings: DemoSettings, data: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Train both models in both implementations, compare them, and write everything down.

    Args:
        out: run directory; files of an earlier demo in it are replaced.
        settings: sizes and steps.
        data: UTF-8 text files; the interpreter's own documentation if empty.

    Returns:
        What `figures.json` holds: settings, machine, results of the four runs, ratios, and whether
        the losses of the two implementations agree.

    Raises:
        OSError, ValueError: a file cannot be read, is no UTF-8, or is too short.
        RuntimeError: a run failed.
    """
    out = Path(out)
    started = time.perf_counter()
    text = _text(settings, data)
    train_text, held_out_text = split_text(text, settings.held_out)
    print(f"text: {len(text):,} characters, {len(held_out_text):,} of them held out", flush=True)
    clock = time.perf_counter()
    tokenizer = BPETokenizer.train(
        train_text, settings.vocab_size, mode="byte", special_tokens=SPECIAL_TOKENS
    )
    train_ids, held_out_ids = (encode_text(tokenizer, t) for t in (train_text, held_out_text))
    if min(len(train_ids), len(held_out_ids)) < 2:
        raise ValueError(
            f"the text is too short: {len(train_ids)} tokens to train on, "
            f"{len(held_out_ids)} held out"
        )
    prompt_ids = list(tokenizer.encode(settings.prompt))
    seconds = time.perf_counter() - clock
    print(
        f"tokenizer: {tokenizer.vocab_size:,} tokens learnt and {len(train_ids):,} tokens encoded "
        f"in {seconds:.1f} s",
        flush=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    with tempfile.TemporaryDirectory(prefix="lmfast-demo-") as scratch:
        work = Path(scratch)
        np.save(work / "train.npy", train_ids.numpy())
        np.save(work / "held-out.npy", held_out_ids.numpy())
        results = {}
        for model in MODELS:
            for implementation in IMPLEMENTATIONS:
                job = Job(
                    model=model,
                    implementation=implementation,
                    settings=settings,
                    vocab_size=tokenizer.vocab_size,
                    pad_id=tokenizer.special_tokens["<pad>"],
                    train_ids=str(work / "train.npy"),
                    held_out_ids=str(work / "held-out.npy"),
                    prompt_ids=prompt_ids,
                    model_dir=str((out / model).resolve()),
                    result=str(work / "result.json"),
                )
                results[model, implementation] = _in_own_process(job, work)
            tokenizer.save(out / model / "tokenizer.json")
    samples = {m: tokenizer.decode(results[m, "lmfast"].pop("sampled_ids")) for m in MODELS}
    figures = _figures(settings, results, samples, time.perf_counter() - started)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    _print(out, results, samples, figures)
    return figures


def _without_blank_lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _text(settings: DemoSettings, data: Sequence[str | Path]) -> str:
    if not data:
        return interpreter_documentation(settings.text_characters)
    text = "\n".join(read_text(path) for path in data)
    if not text.strip():
        raise ValueError(f"there is no text in {', '.join(str(path) for path in data)}")
    return text


def _in_own_process(job: Job, work: Path) -> dict[str, Any]:
    """Run a job in a new interpreter, so that its peak memory is its own."""
    path = work / "job.json"
    job.save(path)
    process = subprocess.Popen([sys.executable, "-m", "lmfast.demo.worker", str(path)])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was told as well
        raise
    if code == 130:
        raise KeyboardInterrupt
    name = f"the {job.implementation} {job.model} run"
    if code != 0:
        raise RuntimeError(f"{name} failed with status {code}")
    result = json.loads(Path(job.result).read_text(encoding="utf-8"))
    if "error" in result:
        raise RuntimeError(f"{name} failed: {result['error']}")
    return result


def _figures(
    settings: DemoSettings,
    results: dict[tuple[str, str], dict[str, Any]],
    samples: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    differences = {model: largest_difference(results, model) for model in MODELS}
    return {
        "lmfast": lmfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seconds": seconds,
        "settings": asdict(settings),
        "results": [results[m, i] for m in MODELS for i in IMPLEMENTATIONS],
        "ratios": {model: ratios(results, model) for model in MODELS},
        "largest_difference": differences,
        "losses_agree": max(differences.values()) <= LOSS_TOLERANCE[settings.precision],
        "samples": samples,
    }


def _print(
    out: Path,
    results: dict[tuple[str, str], dict[str, Any]],
    samples: dict[str, str],
    figures: dict[str, Any],
) -> None:
    print(f"\n{table(results)}\n")
    print("Speeds are medians over steps; peak memory is what training added to the process.")
    for model in MODELS:
        apart = figures["largest_difference"][model]
        print(f"{model}: over all steps the two training losses are at most {apart:.1e} apart")
    for model in MODELS:
        print(f"\n--- {model}, sampled ---\n{_without_blank_lines(samples[model])}")
    written = [f"{model}/" for model in MODELS] + ["tokenizer.json", "figures.json"]
    curves = {
        (model if i == "lmfast" else f"textbook {model}"): (
            results[model, i]["steps"],
            results[model, i]["losses"],
        )
        for model in MODELS
        for i in IMPLEMENTATIONS
    }
    try:
        plot_losses(out / "losses.png", curves, title="The same steps in both implementations")
        written.append("losses.png")
    except ImportError as error:
        print(f"\nno loss curves: {error}")
    print(f"\n{figures['seconds']:.0f} s in all; in {out}: {', '.join(written)}")
