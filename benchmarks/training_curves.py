"""What the reference models learn, by ours and by the textbook's code: the same, and how well.

    python benchmarks/training_curves.py curves [--model decoder] [--steps 30]
    python benchmarks/training_curves.py wikitext [--model decoder]

`curves`: the models at their full size (batch 128, 29 tokens, E = 128, 2 layers, V = 32,011,
AdamW) learn English text from three seeds, in every implementation from the same parameters on
the same batches. Noted are the distances of the loss curves from the textbook's in fp32, beside
what a seed makes of them. About 8 minutes on two cores; `--model` does a part. How fast they learn
is for `bench_training.py` to say.

`wikitext`: one epoch on WikiText-2's validation text, with a vocabulary of 8,000 learnt from it,
then the perplexity of its test text. About 3 minutes.

The corpora are read from a directory that is not part of this project: `--data`, or the
environment variable LMFAST_TEST_DATA. Each part replaces its entry in the file of results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_peers import reference_models

import lmfast
from lmfast import _extension
from lmfast.models.textbook import textbook_loss
from lmfast.tokenizer import BPETokenizer
from lmfast.training import (
    SPECIAL_TOKENS,
    PackedBatches,
    Trainer,
    encode_text,
    evaluate,
    read_text,
    seed_everything,
)
from lmfast.training.metrics import model_loss

ROOT = Path(__file__).resolve().parent.parent
B, T = 128, 29
SEEDS = (42, 43, 44)
# name -> matmul precision; the rest follows from the name's first word.
CURVES = {
    "textbook": "highest",
    "lmfast": "highest",
    "lmfast medium": "medium",
    "torch": "highest",
}
EPOCHS = {name: precision for name, precision in CURVES.items() if name != "torch"}


def build(kind: str, vocab_size: int, name: str, seed: int) -> nn.Module:
    """Return a model with the parameters that belong to the seed."""
    seed_everything(seed)
    ours, textbook, torchs = reference_models(kind, vocab_size, T)
    return {"lmfast": ours, "textbook": textbook, "torch": torchs}[name.split()[0]]


def learn(
    kind: str, name: str, precision: str, ids: torch.Tensor, vocab_size: int, seed: int, steps: int
) -> tuple[nn.Module, Callable[..., Any], Trainer]:
    """Train a model for so many steps, 0 = one epoch; return it, its loss, and the trainer."""
    torch.set_float32_matmul_precision(precision)
    model = build(kind, vocab_size, name, seed)
    loss = model_loss if name.startswith("lmfast") else textbook_loss
    if name == "torch" and kind == "decoder":
        loss = torch.compile(textbook_loss)
    batches = PackedBatches(ids, B, context=T, seed=seed)
    # The textbook's optimiser is AdamW as one writes it.
    plain = torch.optim.AdamW(model.parameters(), 1e-3) if name == "textbook" else None
    trainer = Trainer(
        model,
        batches,
        max_steps=steps or len(batches),
        loss=loss,
        optimizer=plain,
        learning_rate=1e-3,
        description=f"{kind} {name} {seed}",
    )
    trainer.fit()
    return model, loss, trainer


def distance(curve: list[float], other: list[float]) -> dict[str, float]:
    """Return the mean and the largest distance of two curves, in nats."""
    apart = [abs(a - b) for a, b in zip(curve, other, strict=True)]
    return {"mean": round(statistics.fmean(apart), 6), "largest": round(max(apart), 6)}


def curves(kind: str, data: Path, steps: int) -> dict[str, Any]:
    """Return how far the implementations' loss curves are apart."""
    texts = ("wikitext2.valid.txt", "wikitext2.test.txt", "tinyshakespeare.txt")
    text = "".join(read_text(data / name) for name in texts)
    tokenizer = BPETokenizer.train(text, 32_011, special_tokens=SPECIAL_TOKENS)
    ids = encode_text(tokenizer, text)
    losses: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for seed in SEEDS:
        for name, precision in CURVES.items():
            report = learn(kind, name, precision, ids, tokenizer.vocab_size, seed, steps)[2].report
            losses[name].append(report.losses)
    between = [
        distance(losses["textbook"][i], losses["textbook"][j]) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    return {
        "vocabulary": tokenizer.vocab_size,
        "steps": steps,
        "seeds": SEEDS,
        "first_losses": [round(curve[0], 4) for curve in losses["textbook"]],
        "last_losses": {
            name: [round(curve[-1], 4) for curve in found] for name, found in losses.items()
        },
        "distance_between_seeds": _worst(between),
        "distance_from_textbook": {
            name: _worst([distance(a, b) for a, b in zip(losses[name], losses["textbook"])])
            for name in CURVES
            if name != "textbook"
        },
    }


def _worst(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(one[key] for one in found) for key in ("mean", "largest")}


def wikitext(kind: str, data: Path, steps: int) -> dict[str, Any]:
    """Return the test perplexity after one epoch on the validation text."""
    train, test = (read_text(data / f"wikitext2.{part}.txt") for part in ("valid", "test"))
    tokenizer = BPETokenizer.train(train, 8_000, special_tokens=SPECIAL_TOKENS)
    ids, held_out = (encode_text(tokenizer, text) for text in (train, test))
    batches = PackedBatches(held_out, B, context=T, shuffle=False)
    results = {}
    for name, precision in EPOCHS.items():
        model, loss, trainer = learn(kind, name, precision, ids, 8_000, SEEDS[0], steps)
        result = evaluate(model, batches, loss=loss)
        bits = result.loss * result.tokens / math.log(2)
        results[name] = {
            "steps": trainer.report.step,
            "train_loss": round(statistics.fmean(trainer.report.losses[-20:]), 4),
            "test_loss": round(result.loss, 4),
            "test_perplexity": round(result.perplexity, 2),
            "test_bits_per_byte": round(bits / len(test.encode()), 4),
            "test_tokens": result.tokens,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["curves", "wikitext"])
    parser.add_argument("--model", choices=["decoder", "recurrent"], help="default: both")
    parser.add_argument("--steps", type=int, help="default: 30 for curves, an epoch for wikitext")
    default = os.environ.get("LMFAST_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="directory of corpora")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "training.json",
        help="file whose entries are replaced",
    )
    options = parser.parse_args()
    lmfast.tune_allocator()
    stored: dict[str, Any] = {}
    if options.results.is_file():
        stored = json.loads(options.results.read_text(encoding="utf-8"))
    stored["machine"] = {
        "threads": torch.get_num_threads(),
        "cpu_level": _extension.cpu_isa(),
        "torch": torch.__version__,
        "lmfast": lmfast.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for kind in [options.model] if options.model else ["decoder", "recurrent"]:
        if options.part == "curves":
            result = curves(kind, options.data, options.steps or 30)
        else:
            result = wikitext(kind, options.data, options.steps or 0)
        stored.setdefault(options.part, {})[kind] = result
        print(json.dumps(result, indent=1))
        options.results.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
