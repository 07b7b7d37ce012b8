"""A whole training step of the two reference models, optimiser included: 128 sequences of 29
tokens, E = 128, 2 layers, V = 32,011.

Peers: the textbook model with AdamW as one writes it, always in fp32; the same model in PyTorch's
own fused functions (`training_peers.py`), the decoder compiled, with the fused AdamW, in the
precision of the row; and, as what training costs on top of steps, ours inside a `Trainer`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from training_peers import reference_models

from lmfast.models.textbook import textbook_loss
from lmfast.training import PackedBatches, Trainer

B, T, V = 128, 29, 32011


def step(
    model: nn.Module, loss: Callable[[], Tensor], precision: str, *, fused: bool
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)

    def run() -> None:
        torch.set_float32_matmul_precision(precision)
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        torch.set_float32_matmul_precision("highest")

    return run


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def bench_training(compare: Callable[..., None], kind: str, precision: str) -> None:
    torch.manual_seed(0)
    ours, textbook, torchs = reference_models(kind, V, T)
    ids = torch.randint(1, V, (B * T + 1,))
    x, y = next(iter(PackedBatches(ids, B, context=T)))

    def torch_loss() -> Tensor:
        return textbook_loss(torchs, x, y, -100)

    peer = torch.compile(torch_loss) if kind == "decoder" else torch_loss
    in_trainer = reference_models(kind, V, T)[0]
    trainer = Trainer(in_trainer, PackedBatches(ids, B, context=T), max_steps=1, progress=False)

    def trainer_step() -> None:
        torch.set_float32_matmul_precision(precision)
        trainer.max_steps += 1
        trainer.fit()
        torch.set_float32_matmul_precision("highest")

    compare(
        f"training step, {kind}, {precision}",
        step(ours, lambda: ours.loss(x, y), precision, fused=True),
        {
            "textbook": step(
                textbook, lambda: textbook_loss(textbook, x, y, -100), "highest", fused=False
            ),
            "torch": step(torchs, peer, precision, fused=True),
            "trainer": trainer_step,
        },
        rounds=5,
    )
