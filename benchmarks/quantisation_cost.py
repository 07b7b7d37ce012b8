"""What narrow weights cost: perplexity on held-out text, and memory, of a model trained here.

    python benchmarks/quantisation_cost.py [--steps 700]

A decoder in the style of Llama (192 wide, 3 layers, vocabulary 4,000) learns four fifths of
WikiText-2's validation and test text, 3 to 4 minutes on two cores. The engine then reads the rest
with its weights in each form, rounded to nearest or calibrated with 8,000 tokens of what was
learnt. `weights_MB` is what the engine packed.

The corpora are read from a directory that is not part of this project: `--data`, or the
environment variable LMFAST_TEST_DATA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import lmfast
from lmfast import _extension
from lmfast.models import DecoderLanguageModel
from lmfast.tokenizer import BPETokenizer
from lmfast.training import (
    SPECIAL_TOKENS,
    PackedBatches,
    Trainer,
    encode_text,
    read_text,
    seed_everything,
)

ROOT = Path(__file__).resolve().parent.parent
V, WIDTH, LAYERS, CONTEXT, BATCH = 4_000, 192, 3, 64, 32
READ = 256  # tokens the engine sees of a text
CALIBRATION = 32  # such texts
# (weights, group, calibrated)
FORMS: list[tuple[str, int | None, bool]] = [
    ("fp32", None, False),
    ("bf16", None, False),
    ("int8", None, False),
    ("int8", 64, False),
    ("int8", None, True),
    ("int4", 32, False),
    ("int4", 32, True),
    ("int4", 64, False),
    ("int4", 64, True),
]


def learn(ids: torch.Tensor, pad_id: int, steps: int) -> DecoderLanguageModel:
    """Train the model."""
    seed_everything(42)
    model = DecoderLanguageModel(
        *(V, WIDTH, 6, LAYERS, pad_id),
        final_norm=True,
        mlp="swiglu",
        mlp_dim=512,
        num_kv_heads=2,
    )
    batches = PackedBatches(ids, BATCH, context=CONTEXT, seed=42)
    Trainer(model, batches, max_steps=steps, learning_rate=2e-3, clip_norm=1.0).fit()
    return model.eval()


@torch.inference_mode()
def perplexity(generator: lmfast.Generator, texts: torch.Tensor) -> float:
    """Of texts (N, T), of every token but the first."""
    total, count = 0.0, 0
    runner = generator.runner
    for part in texts.split(8):
        state = runner.new_state(len(part))
        logits, _ = runner.step(part[:, :-1], state, all_positions=True)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + float(loss), count + part[:, 1:].numel()
    return math.exp(total / count)


def measure(model: DecoderLanguageModel, learnt: torch.Tensor, held_out: torch.Tensor) -> list[Any]:
    """A row for every form."""
    texts = learnt[: CALIBRATION * READ].view(CALIBRATION, READ)
    rows: list[Any] = []
    for weights, group, calibrated in FORMS:
        begin = time.perf_counter()
        stored: Any = weights
        if weights in ("int8", "int4"):
            given = [texts] if calibrated else None
            stored = lmfast.quantise(model, weights, group=group, texts=given)  # type: ignore[arg-type]
        generator = lmfast.Generator(model, weights=stored)
        seconds = time.perf_counter() - begin
        found = perplexity(generator, held_out)
        first = rows[0]["perplexity"] if rows else found
        rows.append(
            {
                "weights": weights,
                "group": group,
                "calibrated": calibrated,
                "perplexity": round(found, 4),
                "cost_percent": round(100 * (found / first - 1), 3),
                "weights_MB": round(generator.memory() / 1e6, 3),
                "seconds_to_make": round(seconds, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    default = os.environ.get("LMFAST_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="directory of corpora")
    parser.add_argument("--results", type=Path, help="file to write")
    options = parser.parse_args()
    lmfast.tune_allocator()
    text = "".join(read_text(options.data / f"wikitext2.{part}.txt") for part in ("valid", "test"))
    tokenizer = BPETokenizer.train(text, V, special_tokens=SPECIAL_TOKENS)
    ids = encode_text(tokenizer, text).long()
    learnt, rest = ids[: len(ids) * 4 // 5], ids[len(ids) * 4 // 5 :]
    held_out = rest[: len(rest) // READ * READ].view(-1, READ)
    model = learn(learnt, tokenizer.pad_id or 0, options.steps)
    rows = measure(model, learnt, held_out)
    result = {
        "machine": {
            "threads": torch.get_num_threads(),
            "cpu_level": _extension.cpu_isa(),
            "torch": torch.__version__,
            "lmfast": lmfast.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        },
        "model": {"width": WIDTH, "layers": LAYERS, "vocabulary": V, "steps": options.steps},
        "held_out_tokens": held_out[:, 1:].numel(),
        "rows": rows,
    }
    if options.results is not None:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)
        options.results.write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
