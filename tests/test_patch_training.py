"""`lmfast.patch` where others train: adapters of peft, transformers' Trainer with accelerate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lmfast

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers.logging.set_verbosity_error()

from transformers_models import make  # noqa: E402

from lmfast.integrations.transformers import use_lmfast  # noqa: E402

IDS = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def test_peft_before_and_after() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], lora_dropout=0.0)
    plain = make("llama")
    first = peft.get_peft_model(copy.deepcopy(plain), config)
    for name, p in first.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    state = {k: v for k, v in first.state_dict().items() if "lora" in k}
    loss = first(IDS, labels=IDS).loss
    lmfast.patch(first)  # adapters, then patch
    patched_first = copy.deepcopy(plain)
    lmfast.patch(patched_first)
    second = peft.get_peft_model(patched_first, config)
    second.load_state_dict(state, strict=False)
    for model in (first, second):
        got = model(IDS, labels=IDS)
        torch.testing.assert_close(got.loss, loss)
        got.loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)
    merged = second.merge_and_unload()
    torch.testing.assert_close(merged(IDS, labels=IDS).loss, loss)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(tmp_path: Any, bf16: bool) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]
    losses = []
    for use in (False, True):
        model = make("llama")
        callback = use_lmfast()
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                bf16=bf16,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[callback] if use else [],
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        if use:
            assert callback.report is not None
            assert len(callback.report.replaced) > 20
    assert len(losses[0]) == 5
    # Logged with four digits; bf16 products as in test_autocast.
    assert losses[1] == pytest.approx(losses[0], rel=3e-2 if bf16 else 1e-3)
