"""The options of `lmfast train`, and which of them go together."""

from __future__ import annotations

import argparse

from lmfast.commands.options import COUNT, NATURAL, POSITIVE, add_machine_options, number
from lmfast.commands.typed import refuse_typed
from lmfast.nn.stack import CELLS
from lmfast.training.schedule import KINDS

# Options of one kind of model.
_OF_KIND = {
    "decoder": ("heads", "kv_heads", "final_norm", "recompute"),
    "recurrent": ("cell", "carry_state"),
}

_EPILOG = (
    "DIR receives tokenizer.json, run.json, log.csv, checkpoints/, and at the end "
    "model.safetensors, config.json, report.json and losses.png. Ctrl-C and SIGTERM save a "
    "checkpoint; `lmfast train --out DIR --resume` continues exactly there, with the settings in "
    "run.json; only --steps, --device, --threads, --workers, --accumulate, --recompute and --fsdp "
    "may be others. Several processes: `torchrun --nproc-per-node N -m lmfast train ...`, on one "
    "machine or more; --batch-size is that of all processes together, and the result is that of "
    "one."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text, .jsonl, both also as .gz, .bz2 or .xz, or a directory made by "
        "datasets' save_to_disk",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="run directory")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR")
    _add_model(parser.add_argument_group("model"))
    _add_text(parser.add_argument_group("text"))
    _add_steps(parser.add_argument_group("optimisation"))
    _add_evaluation(parser.add_argument_group("evaluation, checkpoints and logs"))
    add_machine_options(parser, auto=True)
    machine = parser.add_argument_group("memory and processes")
    machine.add_argument(
        "--autocast", action="store_true", help="compute in bf16, keep parameters in fp32"
    )
    machine.add_argument(
        "--recompute", action="store_true", help="compute activations of blocks twice, keep none"
    )
    machine.add_argument(
        "--fsdp", action="store_true", help="divide the parameters among processes (FSDP2)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", choices=["decoder", "recurrent"], default="decoder", help="its kind"
    )
    group.add_argument("--emb-dim", type=COUNT, default=128, metavar="N", help="model width")
    group.add_argument(
        "--layers", type=COUNT, default=2, metavar="N", help="blocks or recurrent layers"
    )
    group.add_argument("--cell", choices=CELLS, default="elman", help="of the recurrent model")
    group.add_argument(
        "--heads", type=COUNT, default=8, metavar="N", help="query heads of the decoder"
    )
    group.add_argument(
        "--kv-heads", type=COUNT, metavar="N", help="key/value heads (default: as --heads)"
    )
    group.add_argument("--final-norm", action="store_true", help="norm before the output layer")
    group.add_argument("--tie-weights", action="store_true", help="embedding as output layer")


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tokenizer", metavar="FILE", help="use this one instead of a new one")
    group.add_argument(
        "--vocab-size",
        type=COUNT,
        default=8_000,
        metavar="N",
        help="of a new tokenizer",
    )
    group.add_argument(
        "--mode", choices=["byte", "char"], default="byte", help="of a new tokenizer"
    )
    group.add_argument(
        "--lines", action="store_true", help="each line of a text file is a text of its own"
    )
    group.add_argument(
        "--text-field", default="text", metavar="NAME", help="of JSON lines and data sets"
    )
    group.add_argument(
        "--digits", metavar="TEXT", help="takes the place of every run of digits, such as <num>"
    )
    group.add_argument(
        "--examples",
        choices=["windows", "texts"],
        help="windows: cut from all texts one behind the other; texts: each one, cut at the "
        "context and padded (default: texts with --lines, else windows)",
    )
    group.add_argument(
        "--context", type=COUNT, default=64, metavar="N", help="tokens a model sees at once"
    )
    group.add_argument("--add-eos", action="store_true", help="end each text with <eos>")
    group.add_argument(
        "--bad-lines",
        choices=["error", "skip"],
        default="error",
        help="what happens at a line that cannot be used; it is named in both cases",
    )
    group.add_argument(
        "--carry-state",
        action="store_true",
        help="the recurrent model reads on where it was: truncated BPTT through --context tokens",
    )
    group.add_argument(
        "--stream", action="store_true", help="read while training, for more text than memory"
    )
    group.add_argument(
        "--buffer",
        type=COUNT,
        default=8192,
        metavar="N",
        help="examples shuffled together in a stream",
    )
    group.add_argument(
        "--workers", type=COUNT, metavar="N", help="threads that encode (default: all CPUs)"
    )


def _add_steps(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps", type=COUNT, metavar="N", help="optimiser steps; instead of --epochs"
    )
    group.add_argument(
        "--epochs", type=POSITIVE, default=1.0, metavar="X", help="passes over the text"
    )
    group.add_argument(
        "--batch-size", type=COUNT, default=64, metavar="N", help="examples per step"
    )
    group.add_argument(
        "--accumulate",
        type=COUNT,
        default=1,
        metavar="N",
        help="parts in which a batch goes through the model; the step stays the same",
    )
    group.add_argument("--learning-rate", type=POSITIVE, default=1e-3, metavar="X", help="of AdamW")
    group.add_argument("--schedule", choices=KINDS, default="constant", help="of the learning rate")
    group.add_argument(
        "--warmup", type=NATURAL, default=0, metavar="N", help="steps of linear warm-up"
    )
    group.add_argument(
        "--min-learning-rate", type=number(float, 0), metavar="X", help="end of the schedule"
    )
    group.add_argument(
        "--weight-decay", type=number(float, 0), default=0.01, metavar="X", help="of AdamW"
    )
    group.add_argument(
        "--clip-norm", type=POSITIVE, metavar="X", help="largest norm of the gradient"
    )
    group.add_argument(
        "--clip-value", type=POSITIVE, metavar="X", help="largest number in the gradient"
    )
    group.add_argument(
        "--seed", type=NATURAL, default=42, metavar="N", help="of parameters and order of the text"
    )
    group.add_argument(
        "--deterministic", action="store_true", help="refuse kernels that vary from run to run"
    )


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--held-out",
        type=number(float, 0, highest=0.9),
        metavar="SHARE",
        help="of the text, at its end, for evaluation (default: 0.05, in a stream none)",
    )
    group.add_argument("--eval-data", nargs="+", metavar="FILE", help="evaluate on these instead")
    group.add_argument(
        "--eval-every", type=NATURAL, default=200, metavar="N", help="steps, 0 = at the end only"
    )
    group.add_argument(
        "--eval-batches", type=COUNT, metavar="N", help="evaluate on so many (default: all)"
    )
    group.add_argument(
        "--patience",
        type=COUNT,
        metavar="N",
        help="stop after N evaluations without a lower loss; the best model is the result",
    )
    group.add_argument(
        "--save-every",
        type=NATURAL,
        default=200,
        metavar="N",
        help="steps between checkpoints; the end is one, too; 0 = never",
    )
    group.add_argument("--keep", type=COUNT, default=2, metavar="N", help="checkpoints, the latest")
    group.add_argument(
        "--tensorboard", action="store_true", help="event files in DIR/tensorboard, too"
    )


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other, or of which one has no effect."""
    if not options.data:
        raise ValueError("--data is needed: text files to train on (or --resume)")
    if options.steps is not None:
        refuse_typed(options, ["epochs"], f"has no effect beside --steps {options.steps}")
    if options.tokenizer is not None:
        refuse_typed(
            options,
            ["vocab_size", "mode"],
            f"is of a new tokenizer: leave it out, or --tokenizer {options.tokenizer}",
        )
    for kind, names in _OF_KIND.items():
        if kind != options.model:
            reason = f"is for --model {kind}, not {options.model}: leave it out"
            refuse_typed(options, names, reason)
    separate = options.lines or options.examples == "texts" or options.stream
    if options.carry_state and separate:
        raise ValueError(
            "--carry-state reads one long text: it excludes --lines, --examples texts and --stream"
        )
    if options.stream:
        if options.held_out:
            raise ValueError("--held-out needs the end of the text, --stream does not: --eval-data")
    else:
        refuse_typed(options, ["buffer"], "is for --stream: text in memory is shuffled as a whole")
    if options.eval_data and options.held_out:
        raise ValueError("--eval-data and --held-out exclude each other")
    if not options.save_every:
        refuse_typed(options, ["keep"], "has no effect beside --save-every 0")
    if options.patience is not None and not options.eval_every:
        raise ValueError("--patience needs --eval-every above 0")
    if options.min_learning_rate is not None:
        if options.schedule == "constant":
            raise ValueError("--min-learning-rate needs --schedule linear or cosine")
        if options.min_learning_rate > options.learning_rate:
            raise ValueError(
                f"--min-learning-rate {options.min_learning_rate:g} is above "
                f"--learning-rate {options.learning_rate:g}"
            )
