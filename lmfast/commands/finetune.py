"""`lmfast finetune`: teach a trained model to answer prompts, whole or by low-rank updates."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lmfast._compressed import open_text
from lmfast.commands.options import (
    COUNT,
    NATURAL,
    POSITIVE,
    add_machine_options,
    apply_machine_options,
    load_tokenizer,
    number,
)
from lmfast.commands.typed import refuse_typed
from lmfast.tokenizer import BPETokenizer
from lmfast.training import (
    CompletionBatches,
    CompletionExample,
    CsvLog,
    DataError,
    LoRA,
    Schedule,
    Trainer,
    completion_example,
    load_model,
    lora,
    save_model,
    seed_everything,
)
from lmfast.training.chat_format import CHAT_FORMATS, ChatFormat, save_chat_format

_EPILOG = (
    'Each line of FILE is an object: {"prompt": TEXT, "completion": TEXT}, or {"messages": '
    '[{"role": "user", "content": TEXT}, {"role": "assistant", ...}]}, of which every turn of the '
    "assistant is learnt. Prompts do not count in the loss. DIR receives the model with what it "
    "learnt in its matrices, for `lmfast generate` and, where there were messages, in their format "
    "for `lmfast chat`; with --lora the updates in DIR/adapter."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = _EPILOG
    parser.add_argument("--model", required=True, metavar="DIR", help="of train or demo")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines to learn from")
    parser.add_argument("--out", required=True, metavar="DIR", help="made for the result")
    parser.add_argument(
        "--format",
        choices=list(CHAT_FORMATS),
        default="chatml",
        help="how messages are written",
    )
    parser.add_argument(
        "--separator", default="", metavar="TEXT", help="put behind every prompt of a pair"
    )
    parser.add_argument(
        "--max-length",
        type=COUNT,
        default=512,
        metavar="N",
        help="tokens; prompts are cut",
    )
    parser.add_argument("--lora", type=COUNT, metavar="RANK", help="train low-rank updates only")
    parser.add_argument(
        "--alpha", type=POSITIVE, default=16.0, metavar="X", help="scales them by X / RANK"
    )
    parser.add_argument(
        "--targets", nargs="+", metavar="NAME", help="what they update (default: every layer)"
    )
    parser.add_argument("--dropout", type=number(float, 0, highest=0.9), default=0.0, metavar="P")
    parser.add_argument("--epochs", type=POSITIVE, default=1.0, metavar="X", help="passes")
    parser.add_argument("--batch-size", type=COUNT, default=16, metavar="N", help="texts per step")
    parser.add_argument("--learning-rate", type=POSITIVE, default=1e-3, metavar="X")
    parser.add_argument("--clip-norm", type=POSITIVE, default=1.0, metavar="X")
    parser.add_argument("--warmup", type=NATURAL, default=0, metavar="N", help="steps")
    parser.add_argument("--seed", type=NATURAL, default=42, metavar="N")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Train on prompts and completions, and write the result."""
    out = Path(options.out)
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model already: name another directory")
    if options.lora is None:
        refuse_typed(options, ["targets", "alpha", "dropout"], "is of --lora RANK")
    device = apply_machine_options(options)
    seed_everything(options.seed)
    model = load_model(options.model, device=device)
    tokenizer = load_tokenizer(options.model)
    chat = CHAT_FORMATS[options.format]
    examples, chats = [], 0
    for example, from_messages in _examples(options, tokenizer, chat):
        examples.append(example)
        chats += from_messages
    if not examples:
        raise DataError(f"{options.data} has no example")
    if not chats:
        refuse_typed(options, ["format"], f"is of messages, and {options.data} has none")
    if chats == len(examples):
        refuse_typed(options, ["separator"], f"is of prompts, and {options.data} has messages")
    pad_id = model.pad_idx or 0
    batches = CompletionBatches(examples, options.batch_size, pad_id=pad_id, seed=options.seed)
    steps = max(1, math.ceil(options.epochs * len(batches)))
    if options.warmup > steps:
        raise ValueError(f"--warmup {options.warmup} is longer than the run: {steps} steps")
    updates = _updates(options, model)
    out.mkdir(parents=True, exist_ok=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{len(examples):,} examples, {steps:,} steps, {trained:,} parameters to train", flush=True
    )
    trainer = Trainer(
        model,
        batches,
        max_steps=steps,
        learning_rate=options.learning_rate,
        schedule=Schedule("cosine", total_steps=steps, warmup_steps=options.warmup),
        clip_norm=options.clip_norm,
        logs=[CsvLog(out / "log.csv")],
        progress=not options.quiet,
        description="finetune",
    )
    report = trainer.fit()
    if report.interrupted:
        print(f"stopped at step {report.step} of {steps}; nothing was written", file=sys.stderr)
        return 128 + report.stop_signal
    if updates is not None:
        updates.save(out / "adapter")
        updates.remove(merge=True)
    tokenizer.save(out / "tokenizer.json")
    if chats:
        save_chat_format(out, chat)
    save_model(out, model)
    last = report.losses[-20:]
    print(f"training loss {sum(last) / len(last):.4f}; model in {out}")
    return 0


def _updates(options: argparse.Namespace, model: nn.Module) -> LoRA | None:
    if options.lora is None:
        return None
    return lora(model, options.lora, options.alpha, options.targets, dropout=options.dropout)


def _examples(
    options: argparse.Namespace, tokenizer: BPETokenizer, chat: ChatFormat
) -> Iterator[tuple[CompletionExample, bool]]:
    """Examples, and of each whether it is a turn of a conversation."""
    with open_text(options.data) as lines:
        for index, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                for prompt, completion in _pairs(entry, chat, options.separator):
                    example = completion_example(
                        list(tokenizer.encode(prompt)),
                        list(tokenizer.encode(completion)),
                        tokenizer.eos_id,
                        max_length=options.max_length,
                    )
                    yield example, "messages" in entry
            except json.JSONDecodeError as error:
                raise DataError(f"{options.data}:{index}: the line is not JSON: {error}") from error
            except ValueError as error:  # UTF-8 among them
                raise DataError(f"{options.data}:{index}: {error}") from error


def _pairs(entry: Any, chat: ChatFormat, separator: str) -> list[tuple[str, str]]:
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        return chat.examples(entry["messages"])
    if isinstance(entry, dict) and all(
        isinstance(entry.get(name), str) for name in ("prompt", "completion")
    ):
        return [(entry["prompt"] + separator, entry["completion"])]
    raise ValueError("the line must have texts prompt and completion, or a list messages")
