"""Runs that tests/test_training_processes.py does in one process and, under torchrun, in two.

    torchrun --nproc-per-node 2 tests/training_processes_worker.py DIRECTORY

The losses, evaluations and parameters of each go to DIRECTORY/NAME.pt, what is wrong with DTensors
to DIRECTORY/dtensors.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import dtensor_cases
import torch

from lmfast.models import DecoderLanguageModel, LanguageModel, RecurrentLanguageModel
from lmfast.training import (
    Batches,
    ContiguousBatches,
    PaddedBatches,
    Processes,
    Trainer,
    load_model,
    process_group,
)

V = 13


def text() -> torch.Tensor:
    return torch.randint(1, V, (401,), generator=torch.Generator().manual_seed(0))


def ragged() -> Batches:
    """55 texts in batches of 9, of 2 to 12 tokens: processes get different numbers of targets, and
    of the last batch, which is one text, some get none."""
    bounds = [0]
    while len(bounds) < 56:
        bounds.append(bounds[-1] + 2 + len(bounds) * 7 % 11)
    ids = text()
    return PaddedBatches([ids[a:b] for a, b in pairwise(bounds)], 9, max_length=11, seed=1)


def contiguous() -> Batches:
    return ContiguousBatches(text(), 5, context=12)


def decoder() -> LanguageModel:
    return DecoderLanguageModel(V, 16, 2, 2, 0, final_norm=True, output_bias=True)


def tied() -> LanguageModel:
    return DecoderLanguageModel(V, 16, 2, 2, 0, final_norm=True, tie_weights=True)


def recurrent() -> LanguageModel:
    return RecurrentLanguageModel(V, 16, 2, 0)


STEPS = 8
# name -> model, batches, dtype, options; "shard" is left out where there is one process only.
RUNS: dict[str, tuple[Callable[[], LanguageModel], Callable[[], Batches], torch.dtype, dict]] = {
    "ddp": (decoder, ragged, torch.float64, {}),
    "ddp fp32": (decoder, ragged, torch.float32, {}),
    "ddp parts": (decoder, ragged, torch.float64, {"accumulate": 3}),
    "ddp recompute": (decoder, ragged, torch.float64, {"recompute": True}),
    "ddp states": (recurrent, contiguous, torch.float64, {"accumulate": 2}),
    "fsdp": (decoder, ragged, torch.float64, {"shard": True}),
    "fsdp fp32": (decoder, ragged, torch.float32, {"shard": True}),
    "fsdp tied": (tied, ragged, torch.float64, {"shard": True, "accumulate": 3}),
    "fsdp recompute": (decoder, ragged, torch.float64, {"shard": True, "recompute": True}),
    "fsdp states": (recurrent, contiguous, torch.float64, {"shard": True}),
}


def trainer(name: str, directory: Path, steps: int, **options: Any) -> Trainer:
    model, batches, dtype, settings = RUNS[name]
    if Processes.current().count == 1:
        settings = {key: value for key, value in settings.items() if key != "shard"}
    torch.manual_seed(0)
    return Trainer(
        model().to(dtype),
        batches(),
        max_steps=steps,
        evaluation=batches(),
        eval_every=4,
        learning_rate=1e-2,
        clip_norm=0.5,
        output_dir=directory / name,
        progress=False,
        **settings,
        **options,
    )


def train(name: str, directory: Path) -> dict[str, Any]:
    """Run to the middle, save, run to the end in another trainer, and return what came out."""
    trainer(name, directory, STEPS // 2, save_every=STEPS // 2).fit()
    run = trainer(name, directory, STEPS)
    run.resume()
    report = run.fit()
    run.save_model(directory / name / "model")
    return {
        "losses": report.losses,
        "evaluations": report.evaluations,
        "model": load_model(directory / name / "model").state_dict(),
        "held": held(run),
    }


def held(run: Trainer) -> float:
    """The share of parameters and optimiser states that this process holds."""
    states = (t for state in run.optimizer.state.values() for t in state.values())
    tensors: list[Any] = [*run.model.parameters(), *(t for t in states if t.dim())]
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() for t in local) / sum(t.numel() for t in tensors)


def main() -> None:
    directory = Path(sys.argv[1])
    with process_group("cpu"):
        for name in RUNS:
            result = train(name, directory)
            if Processes.current().first:
                torch.save(result, directory / f"{name}.pt")
        problems = dtensor_cases.run()
        if Processes.current().first:
            (directory / "dtensors.json").write_text(json.dumps(problems), encoding="utf-8")


if __name__ == "__main__":
    # Processes that wait for each other for ever say where, and end, before the test gives up.
    faulthandler.dump_traceback_later(240, exit=True)
    main()
    # The caches of PyTorch's DTensors hold the process group past its end. Its threads would run on
    # while the interpreter is taken apart.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
