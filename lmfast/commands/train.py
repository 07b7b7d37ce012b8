"""`lmfast train`: a model from text files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from lmfast.commands import train_options
from lmfast.commands.options import apply_machine_options
from lmfast.commands.train_data import Data, load_data
from lmfast.commands.typed import as_typed
from lmfast.models import DecoderLanguageModel, LanguageModel, RecurrentLanguageModel
from lmfast.tokenizer import BPETokenizer
from lmfast.training import (
    CsvLog,
    Log,
    Processes,
    Schedule,
    TensorBoardLog,
    Trainer,
    TrainingReport,
    plot_losses,
    process_group,
    seed_everything,
)
from lmfast.training.metrics import exp_or_inf

add_arguments = train_options.add_arguments

_PATHS = ("data", "eval_data")
# What is not part of a run's settings: where and how it is run this time.
_THIS_TIME = (
    "run",
    "command",
    "typed",
    "traceback",
    "out",
    "resume",
    "quiet",
    "device",
    "threads",
    "fsdp",
    "recompute",
    "accumulate",
    "workers",
)


def run(options: argparse.Namespace) -> int:
    """Train, or continue to train, in this process or among those that torchrun started."""
    out = Path(options.out)
    if options.resume:
        _restore(options, out)
    elif (out / "run.json").exists():
        raise ValueError(f"{out} holds a run already: continue it with --resume, or name another")
    train_options.check(options)
    with process_group(options.device) as device:
        options.device = device
        return _train(options, out, apply_machine_options(options))


def _train(options: argparse.Namespace, out: Path, device: torch.device) -> int:
    processes = Processes.current()
    if options.fsdp and processes.count == 1:
        raise ValueError("--fsdp needs several processes: torchrun --nproc-per-node N -m lmfast")
    seed_everything(options.seed, deterministic=options.deterministic)
    data = load_data(options, out / "tokenizer.json" if options.resume else None)
    model = _model(options, data.tokenizer).to(device)
    steps = options.steps or math.ceil(options.epochs * len(data.batches))
    if options.warmup > steps:
        raise ValueError(f"--warmup {options.warmup} is longer than the run: {steps} steps")
    trainer = _trainer(options, out, data, model, steps)
    processes.barrier()  # nobody writes before all have looked whether a run is there already
    if not options.resume:
        processes.in_first(lambda: _start(options, out, data.tokenizer))
    else:
        processes.in_first(lambda: _write_settings(options, out))  # --steps may be another
        if trainer.can_resume():  # else it was killed, or ended, before its first checkpoint
            trainer.resume()
    if processes.first:
        among = f" in {processes.count} processes" if processes.count > 1 else ""
        print(
            f"{options.model} of {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{steps:,} steps of {options.batch_size} x {options.context} tokens{among}"
            + (f", on from step {trainer.report.step:,}" if options.resume else ""),
            flush=True,
        )
        if data.note:
            print(data.note, file=sys.stderr)
    report = trainer.fit()
    if report.interrupted:
        if processes.first:
            print(
                f"stopped at step {report.step}; continue with: lmfast train --out {out} --resume",
                file=sys.stderr,
            )
        return 128 + report.stop_signal
    _finish(options, out, data, trainer, report)
    return 0


def _trainer(
    options: argparse.Namespace, out: Path, data: Data, model: LanguageModel, steps: int
) -> Trainer:
    logs: list[Log] = [CsvLog(out / "log.csv")]
    if options.tensorboard:
        logs.append(TensorBoardLog(out / "tensorboard"))
    return Trainer(
        model,
        data.batches,
        max_steps=steps,
        evaluation=data.evaluation,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        schedule=Schedule(
            options.schedule,
            total_steps=steps,
            warmup_steps=options.warmup,
            floor=(options.min_learning_rate or 0) / options.learning_rate,
        ),
        clip_norm=options.clip_norm,
        clip_value=options.clip_value,
        accumulate=options.accumulate,
        autocast=torch.bfloat16 if options.autocast else None,
        recompute=options.recompute,
        eval_every=0 if data.evaluation is None else options.eval_every,
        save_every=options.save_every,
        eval_batches=options.eval_batches,
        patience=options.patience,
        output_dir=out,
        keep=options.keep,
        shard=options.fsdp,
        logs=logs,
        progress=not options.quiet,
        description=options.model,
    )


def _restore(options: argparse.Namespace, out: Path) -> None:
    """Take the settings of the run that is continued."""
    try:
        stored: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
        settings = stored["settings"]
    except FileNotFoundError:
        raise ValueError(f"{out} holds no run to continue: no run.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{out / 'run.json'} is damaged: {error}") from None
    _refuse_others(options, settings, out)
    steps = options.steps
    if steps is not None and steps < (done := _steps_done(out)):
        raise ValueError(f"--steps {steps} is less than the {done} that {out} has been trained for")
    for name, value in settings.items():
        setattr(options, name, value)
    options.steps = steps or options.steps


def _refuse_others(options: argparse.Namespace, settings: dict[str, Any], out: Path) -> None:
    """Raise ValueError for an option that was typed and is not what the run was started with."""
    for name in sorted(options.typed & settings.keys() - {"steps"}):
        typed, stored = getattr(options, name), settings[name]
        if name in _PATHS:
            typed = [str(Path(path).resolve()) for path in typed]
        if typed != stored:
            raise ValueError(
                f"{as_typed(options, name)} is not what {out} was started with, {stored}: "
                "leave it out, or begin another run"
            )


def _steps_done(out: Path) -> int:
    """Steps of the model that a finished run wrote; 0 where none did."""
    try:
        return max(json.loads((out / "report.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _start(options: argparse.Namespace, out: Path, tokenizer: BPETokenizer) -> None:
    """Write down what a new run was started with."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    _write_settings(options, out)


def _write_settings(options: argparse.Namespace, out: Path) -> None:
    kept = {k: v for k, v in vars(options).items() if k not in _THIS_TIME}
    for name in _PATHS:
        if kept[name]:
            kept[name] = [str(Path(path).resolve()) for path in kept[name]]
    text = json.dumps({"format": "lmfast run", "settings": kept}, indent=1)
    partial = out / "run.json.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(out / "run.json")


def _model(options: argparse.Namespace, tokenizer: BPETokenizer) -> LanguageModel:
    if options.model == "recurrent":
        return RecurrentLanguageModel(
            tokenizer.vocab_size,
            options.emb_dim,
            options.layers,
            tokenizer.pad_id,
            cell=options.cell,
            tie_weights=options.tie_weights,
        )
    return DecoderLanguageModel(
        tokenizer.vocab_size,
        options.emb_dim,
        options.heads,
        options.layers,
        tokenizer.pad_id,
        num_kv_heads=options.kv_heads,
        final_norm=options.final_norm,
        tie_weights=options.tie_weights,
    )


def _finish(
    options: argparse.Namespace, out: Path, data: Data, trainer: Trainer, report: TrainingReport
) -> None:
    """Evaluate, write the model and the report, and print the end of it."""
    last = report.evaluations[-1][0] if report.evaluations else 0
    if data.evaluation is not None and last != report.step:
        trainer.evaluate()
    if options.patience is not None and report.best is not None:
        # The last evaluation may be the best and have no checkpoint: its model is the one here.
        if report.best[0] != report.step:
            trainer.load_best()
    trainer.save_model(out)
    if not Processes.current().first:
        return
    _write_report(out, report)
    left_out = sum(len(source.skipped) for source in data.sources)
    if left_out:
        print(f"{left_out} bad lines were left out", file=sys.stderr)
    if report.stopped_early and report.best is not None:
        print(f"stopped early at step {report.step}: step {report.best[0]} was the best")
    print(f"model in {out}")


def _write_report(out: Path, report: TrainingReport) -> None:
    """Write report.json and losses.png, and print the end of both."""
    content = {
        "steps": report.steps,
        "losses": report.losses,
        "evaluations": report.evaluations,
        "best": report.best,
        "tokens": report.tokens,
        "tokens_per_second": report.tokens_per_second,
    }
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    recent = sum(report.losses[-20:]) / len(report.losses[-20:])
    line = f"training loss {recent:.4f}"
    curves = {"training": (report.steps, report.losses)}
    if report.evaluations:
        _, loss, perplexity = report.evaluations[-1]
        line += f", held-out loss {loss:.4f}, perplexity {perplexity:.2f}"
        curves["held out"] = (
            [s for s, *_ in report.evaluations],
            [e[1] for e in report.evaluations],
        )
    else:
        line += f", perplexity {exp_or_inf(recent):.2f}"
    print(f"{line}, {report.tokens_per_second:,.0f} tokens/s")
    try:
        plot_losses(out / "losses.png", curves)
    except ImportError as error:
        print(f"no loss curves: {error}")
