"""One model in one implementation, trained and measured in a process of its own.

A process of its own makes the peak memory honest: what an earlier model allocated, and what the
allocator kept of it, is not there. Run as `python -m lmfast.demo.worker JOB.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lmfast
from lmfast.demo.settings import DemoSettings
from lmfast.generation import generate
from lmfast.models import DecoderLanguageModel, LanguageModel, RecurrentLanguageModel
from lmfast.models.textbook import (
    TextbookDecoder,
    TextbookRecurrent,
    textbook_generate,
    textbook_loss,
)
from lmfast.training import (
    PackedBatches,
    Trainer,
    TrainingDiverged,
    evaluate,
    save_model,
    seed_everything,
)
from lmfast.training.memory import peak_bytes, resident_bytes
from lmfast.training.metrics import model_loss


@dataclass(frozen=True)
class Job:
    """What one worker does; paths are absolute."""

    model: str
    implementation: str
    settings: DemoSettings
    vocab_size: int
    pad_id: int
    train_ids: str
    held_out_ids: str
    prompt_ids: list[int]
    model_dir: str
    result: str

    def save(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Job:
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**content, "settings": DemoSettings(**content["settings"])})


def build(job: Job) -> nn.Module:
    """Return the job's model; both implementations start with the same parameters."""
    s = job.settings
    ours: LanguageModel
    textbook: nn.Module
    if job.model == "decoder":
        sizes = (job.vocab_size, s.emb_dim, s.num_heads, s.num_layers, job.pad_id)
        ours = DecoderLanguageModel(*sizes)
        if job.implementation == "lmfast":
            return ours
        textbook = TextbookDecoder(*sizes)
    else:
        ours = RecurrentLanguageModel(job.vocab_size, s.emb_dim, s.num_layers, job.pad_id)
        if job.implementation == "lmfast":
            return ours
        textbook = TextbookRecurrent(job.vocab_size, s.emb_dim, s.num_layers, job.pad_id)
    textbook.load_state_dict(ours.state_dict())
    return textbook


def warm_up(job: Job) -> None:
    """Take one step with a tiny model: what PyTorch loads at first use is nobody's memory."""
    tiny = replace(job, vocab_size=16, pad_id=0, settings=job.settings.quick())
    model = build(tiny)
    ids = torch.ones(2, 4, dtype=torch.int64)
    loss = textbook_loss if job.implementation == "textbook" else model_loss
    loss(model, ids, ids, -100).backward()
    torch.optim.AdamW(model.parameters(), fused=job.implementation == "lmfast").step()


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate and generate; return the figures."""
    s = job.settings
    ids = torch.from_numpy(np.load(job.train_ids))
    batches = PackedBatches(ids, s.batch_size, context=s.context, pad_id=job.pad_id, seed=s.seed)
    held_out = PackedBatches(
        torch.from_numpy(np.load(job.held_out_ids)),
        s.batch_size,
        context=s.context,
        pad_id=job.pad_id,
        shuffle=False,
    )
    warm_up(job)
    before = resident_bytes()
    seed_everything(s.seed)
    model = build(job)
    textbook = job.implementation == "textbook"
    loss = textbook_loss if textbook else model_loss
    # The textbook's optimiser is AdamW as one writes it; ours is the fused one of the Trainer.
    rate = s.decoder_learning_rate if job.model == "decoder" else s.recurrent_learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), rate) if textbook else None
    trainer = Trainer(
        model,
        batches,
        max_steps=s.steps,
        loss=loss,
        optimizer=optimizer,
        learning_rate=rate,
        description=f"{job.implementation:>8} {job.model}",
    )
    report = trainer.fit()
    peak = peak_bytes()
    if report.interrupted:
        raise KeyboardInterrupt
    evaluation = evaluate(model, held_out, loss=loss)
    prompt = torch.tensor([job.prompt_ids])
    generated = generation_rate(model, prompt, s.new_tokens, s.generate_repeats)
    sampled = []
    if isinstance(model, LanguageModel):
        save_model(job.model_dir, model)
        generator = torch.Generator().manual_seed(s.seed)
        text = generate(
            model,
            prompt,
            s.new_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            generator=generator,
        )
        sampled = text[0].tolist()
    return {
        "model": job.model,
        "implementation": job.implementation,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": report.steps,
        "losses": report.losses,
        "final_loss": statistics.fmean(report.losses[-20:]),
        "held_out_loss": evaluation.loss,
        "held_out_perplexity": evaluation.perplexity,
        "held_out_tokens": evaluation.tokens,
        "train_tokens_per_second": report.tokens_per_second,
        "generate_tokens_per_second": generated,
        "peak_memory_bytes": peak - before,
        "sampled_ids": sampled,
    }


def generation_rate(model: nn.Module, prompt: Tensor, tokens: int, repeats: int) -> float:
    """Return the median tokens per second of greedy generation, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        if isinstance(model, LanguageModel):
            generate(model, prompt, tokens)
        else:
            textbook_generate(model, prompt, tokens)
        seconds.append(time.perf_counter() - started)
    return tokens / statistics.median(seconds[1:])


def main() -> int:
    """Run the job named on the command line and write its result."""
    job = Job.load(Path(sys.argv[1]))
    lmfast.tune_allocator()  # this and the precision for both implementations alike
    torch.set_float32_matmul_precision(job.settings.precision)
    try:
        result = run(job)
    except KeyboardInterrupt:
        return 130
    except (OSError, TrainingDiverged) as error:
        result = {"error": str(error)}
    Path(job.result).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
