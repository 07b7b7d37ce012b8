"""`lmfast train`: a model from text files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from lmfast.commands.options import (
    COUNT,
    NATURAL,
    POSITIVE,
    add_machine_options,
    apply_machine_options,
    number,
)
from lmfast.models import DecoderLanguageModel, LanguageModel, RecurrentLanguageModel
from lmfast.tokenizer import BPETokenizer
from lmfast.training import (
    SPECIAL_TOKENS,
    Batches,
    PackedBatches,
    PaddedBatches,
    Trainer,
    TrainingReport,
    encode_lines,
    encode_text,
    plot_losses,
    read_text,
    save_model,
    seed_everything,
    split_text,
)
from lmfast.training.metrics import exp_or_inf

# What is not part of a run's settings: where and how it is run this time.
_THIS_TIME = ("run", "command", "traceback", "out", "resume", "quiet", "device", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = (
        "DIR receives tokenizer.json, run.json, checkpoints/, and at the end model.safetensors, "
        "config.json, report.json and losses.png. Ctrl-C saves a checkpoint; "
        "`lmfast train --out DIR --resume` continues exactly there, with the settings in run.json; "
        "only --steps and the machine may be others."
    )
    parser.add_argument("--data", nargs="+", metavar="FILE", help="UTF-8 text files")
    parser.add_argument("--out", required=True, metavar="DIR", help="run directory")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", choices=["decoder", "recurrent"], default="decoder", help="its kind"
    )
    model.add_argument("--emb-dim", type=COUNT, default=128, metavar="N", help="model width")
    model.add_argument(
        "--layers", type=COUNT, default=2, metavar="N", help="blocks or recurrent layers"
    )
    model.add_argument(
        "--heads", type=COUNT, default=8, metavar="N", help="query heads of the decoder"
    )
    model.add_argument(
        "--kv-heads", type=COUNT, metavar="N", help="key/value heads (default: as --heads)"
    )
    model.add_argument("--final-norm", action="store_true", help="norm before the output layer")
    model.add_argument("--tie-weights", action="store_true", help="embedding as output layer")
    text = parser.add_argument_group("text")
    text.add_argument("--tokenizer", metavar="FILE", help="use this one instead of a new one")
    text.add_argument(
        "--vocab-size", type=COUNT, default=8_000, metavar="N", help="of a new tokenizer"
    )
    text.add_argument("--mode", choices=["byte", "char"], default="byte", help="of a new tokenizer")
    text.add_argument("--lines", action="store_true", help="each line is a text of its own")
    text.add_argument(
        "--context", type=COUNT, default=64, metavar="N", help="tokens a model sees at once"
    )
    text.add_argument(
        "--held-out",
        type=number(float, 0, highest=0.9),
        default=0.05,
        metavar="SHARE",
        help="share of the text, at its end, for evaluation",
    )
    steps = parser.add_argument_group("optimisation")
    steps.add_argument(
        "--steps", type=COUNT, metavar="N", help="optimiser steps; instead of --epochs"
    )
    steps.add_argument(
        "--epochs", type=POSITIVE, default=1.0, metavar="X", help="passes over the text"
    )
    steps.add_argument(
        "--batch-size", type=COUNT, default=64, metavar="N", help="texts or windows per step"
    )
    steps.add_argument("--learning-rate", type=POSITIVE, default=1e-3, metavar="X", help="of AdamW")
    steps.add_argument(
        "--weight-decay", type=number(float, 0), default=0.01, metavar="X", help="of AdamW"
    )
    steps.add_argument(
        "--clip-norm", type=POSITIVE, metavar="X", help="largest norm of the gradient"
    )
    steps.add_argument(
        "--eval-every", type=NATURAL, default=200, metavar="N", help="steps, 0 = at the end only"
    )
    steps.add_argument(
        "--save-every", type=NATURAL, default=200, metavar="N", help="steps, 0 = never"
    )
    steps.add_argument(
        "--seed", type=NATURAL, default=42, metavar="N", help="of parameters and order of the text"
    )
    add_machine_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Train, or continue to train."""
    out = Path(options.out)
    if options.resume:
        _restore(options, out)
    elif not options.data:
        raise ValueError("--data is needed: text files to train on (or --resume)")
    elif (out / "run.json").exists():
        raise ValueError(f"{out} holds a run already: continue it with --resume, or name another")
    device = apply_machine_options(options)
    seed_everything(options.seed)
    text = "\n".join(read_text(path) for path in options.data)
    if not text.strip():
        raise ValueError(f"there is no text in {', '.join(options.data)}")
    train_text, held_out_text = split_text(text, options.held_out)
    tokenizer = _tokenizer(options, out, train_text)
    batches = _batches(options, tokenizer, train_text, shuffle=True)
    evaluation = None
    if held_out_text.strip():
        evaluation = _batches(options, tokenizer, held_out_text, shuffle=False)
    model = _model(options, tokenizer).to(device)
    steps = options.steps or math.ceil(options.epochs * len(batches))
    trainer = Trainer(
        model,
        batches,
        max_steps=steps,
        evaluation=evaluation,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        eval_every=options.eval_every if evaluation is not None else 0,
        save_every=options.save_every,
        output_dir=out,
        progress=not options.quiet,
        description=options.model,
    )
    if options.resume:
        trainer.resume()
    else:
        _start(options, out, tokenizer)
    print(
        f"{options.model} of {model.num_parameters():,} parameters, {steps:,} steps of "
        f"{options.batch_size} x {options.context} tokens",
        flush=True,
    )
    report = trainer.fit()
    if report.interrupted:
        print(
            f"stopped at step {report.step}; continue with: lmfast train --out {out} --resume",
            file=sys.stderr,
        )
        return 130
    if evaluation is not None and (not report.evaluations or report.evaluations[-1][0] != steps):
        trainer.evaluate()
    save_model(out, model)
    _write_report(out, report)
    return 0


def _restore(options: argparse.Namespace, out: Path) -> None:
    """Take the settings of the run that is continued."""
    try:
        stored: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
        settings = stored["settings"]
    except FileNotFoundError:
        raise ValueError(f"{out} holds no run to continue: no run.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{out / 'run.json'} is damaged: {error}") from None
    steps = options.steps
    for name, value in settings.items():
        setattr(options, name, value)
    options.steps = steps or options.steps


def _start(options: argparse.Namespace, out: Path, tokenizer: BPETokenizer) -> None:
    """Write down what a new run was started with."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    kept = {k: v for k, v in vars(options).items() if k not in _THIS_TIME}
    kept["data"] = [str(Path(path).resolve()) for path in options.data]
    text = json.dumps({"format": "lmfast run", "settings": kept}, indent=1)
    (out / "run.json").write_text(text + "\n", encoding="utf-8")


def _tokenizer(options: argparse.Namespace, out: Path, text: str) -> BPETokenizer:
    if options.resume:
        return BPETokenizer.load(out / "tokenizer.json")
    if options.tokenizer is not None:
        return BPETokenizer.load(options.tokenizer)
    return BPETokenizer.train(
        text, options.vocab_size, mode=options.mode, special_tokens=SPECIAL_TOKENS
    )


def _batches(
    options: argparse.Namespace, tokenizer: BPETokenizer, text: str, *, shuffle: bool
) -> Batches:
    pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id  # filler; its targets are ignored
    if options.lines:
        return PaddedBatches(
            encode_lines(tokenizer, text),
            options.batch_size,
            max_length=options.context + 1,
            pad_id=pad_id,
            shuffle=shuffle,
            seed=options.seed,
        )
    return PackedBatches(
        encode_text(tokenizer, text),
        options.batch_size,
        context=options.context,
        pad_id=pad_id,
        shuffle=shuffle,
        seed=options.seed,
    )


def _model(options: argparse.Namespace, tokenizer: BPETokenizer) -> LanguageModel:
    if options.model == "recurrent":
        return RecurrentLanguageModel(
            tokenizer.vocab_size, options.emb_dim, options.layers, tokenizer.pad_id
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


def _write_report(out: Path, report: TrainingReport) -> None:
    """Write report.json and losses.png, and print the end of both."""
    content = {
        "steps": report.steps,
        "losses": report.losses,
        "evaluations": report.evaluations,
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
    print(f"model in {out}")
