"""Trainer and checkpoints: learning, evaluation, exact resume, interruption, damage, divergence."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel
from lmfast.models.textbook import TextbookDecoder, textbook_loss
from lmfast.training import (
    CheckpointError,
    PackedBatches,
    RunningLoss,
    Trainer,
    TrainingDiverged,
    TrainingReport,
    evaluate,
    latest_checkpoint,
    load_model,
    perplexity,
    plot_losses,
    save_model,
    seed_everything,
)

V = 13


def text(length=400):
    """A text with a rule to learn: every token is its predecessor plus 1 or 2, modulo 12."""
    steps = torch.randint(1, 3, (length,), generator=torch.Generator().manual_seed(0))
    return 1 + steps.cumsum(0) % 12


def decoder(seed=0):
    torch.manual_seed(seed)
    return DecoderLanguageModel(V, 16, 2, 1, 0)


def trainer(model, steps, tmp_path=None, **options):
    batches = PackedBatches(text(), 8, context=10, seed=1)
    options = {"progress": False, "learning_rate": 1e-2, "output_dir": tmp_path, **options}
    return Trainer(model, batches, max_steps=steps, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_loss_falls_to_the_entropy_of_the_rule(kind):
    model = decoder() if kind == "decoder" else RecurrentLanguageModel(V, 16, 1, 0)
    batches = PackedBatches(text(4001), 8, context=10)
    options = {"learning_rate": 1e-2, "clip_norm": 1.0, "progress": False}
    report = Trainer(model, batches, max_steps=150, **options).fit()
    assert report.step == 150
    assert report.tokens == 3 * 4000  # 50 batches are one epoch
    assert report.losses[0] > 2.3
    # Two equally likely successors: log 2 is what can be reached.
    assert abs(np.mean(report.losses[-20:]) - math.log(2)) < 0.1
    assert report.tokens_per_second > 0


def test_losses_equal_a_loop_written_out():
    ours, textbook = decoder(), TextbookDecoder(V, 16, 2, 1, 0)
    textbook.load_state_dict(ours.state_dict())
    report = trainer(ours, 12, weight_decay=0.1, clip_norm=0.5).fit()
    optimizer = torch.optim.AdamW(textbook.parameters(), 1e-2, weight_decay=0.1)
    batches = PackedBatches(text(), 8, context=10, seed=1)
    expected = []
    for _ in range(12):
        x, y = batches.next_batch()
        loss = F.cross_entropy(textbook(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(textbook.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    # fp32 in another order of summation, through 12 updates.
    assert report.losses == pytest.approx(expected, abs=2e-4)


def test_any_module_trains_with_its_own_loss_and_optimizer():
    model = TextbookDecoder(V, 16, 2, 1, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    report = trainer(model, 30, loss=textbook_loss, optimizer=optimizer).fit()
    assert report.losses[-1] < report.losses[0]


def test_evaluation_is_weighted_by_tokens():
    class Stub(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

    p = [0.1, 0.2, 0.05, 0.5, 0.3, 0.4, 0.15, 0.25]
    batches = [
        (torch.zeros(1, 2), torch.tensor([[0, 1]])),
        (torch.zeros(1, 7), torch.tensor([[2, 3, 4, 5, 6, 7, -100]])),
    ]

    def loss(model, inputs, targets, ignore_index):
        used = targets[targets != ignore_index]
        return -torch.tensor(p, dtype=torch.float64)[used].log().mean()

    result = evaluate(Stub(), batches, loss=loss)
    assert result.tokens == 8
    assert result.perplexity == pytest.approx(5.0813274815, abs=6e-11)
    part = evaluate(Stub(), batches, loss=loss, max_batches=1)
    assert part.perplexity == pytest.approx((0.1 * 0.2) ** -0.5)


def test_uniform_model_has_perplexity_v_and_mode_is_kept():
    model = RecurrentLanguageModel(V, 8, 1, 0)
    nn.init.zeros_(model.fc.weight)
    model.train()
    # fp32 softmax: a few ulps of log 13.
    assert perplexity(model, PackedBatches(text(), 8, context=10)) == pytest.approx(13, rel=1e-6)
    assert model.training
    assert math.isnan(RunningLoss().mean())


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_resume_is_exact(tmp_path, kind):
    def make():
        torch.manual_seed(0)
        if kind == "decoder":
            return DecoderLanguageModel(V, 16, 2, 1, 0, final_norm=True, num_kv_heads=1)
        return RecurrentLanguageModel(V, 16, 2, 0)

    whole_model = make()
    whole = trainer(whole_model, 20).fit()
    trainer(make(), 13, tmp_path, save_every=4).fit()
    saved = tmp_path / "checkpoints"
    assert [p.name for p in sorted(saved.iterdir())] == ["step-00000012", "step-00000013"]
    torch.manual_seed(99)
    model = make()
    continued = trainer(model, 20, tmp_path)
    continued.resume(saved / "step-00000012")
    report = continued.fit()
    assert report.losses == whole.losses
    assert report.steps == whole.steps
    assert report.tokens == whole.tokens
    assert same(model, whole_model)


def test_resume_restores_random_numbers(tmp_path):
    seed_everything(3)
    first = trainer(decoder(), 2, tmp_path)
    first.fit()
    first.save()
    expected = [torch.rand(2).tolist(), random.random(), np.random.rand()]
    seed_everything(4)
    second = trainer(decoder(), 2, tmp_path)
    second.resume()
    assert [torch.rand(2).tolist(), random.random(), np.random.rand()] == expected
    with pytest.raises(ValueError, match="seed must not be negative"):
        seed_everything(-1)
    with pytest.raises(TypeError, match="seed must be an int, got 'x'"):
        seed_everything("x")
    with pytest.raises(TypeError, match=r"batches must be Batches of .*, got NoneType"):
        Trainer(decoder(), None, max_steps=1)


def test_new_run_does_not_touch_an_earlier_one(tmp_path):
    trainer(decoder(), 4, tmp_path, save_every=2).fit()
    with pytest.raises(
        ValueError, match="holds checkpoints of an earlier run, up to step-00000004"
    ):
        trainer(decoder(), 4, tmp_path, save_every=2).fit()


def test_evaluations_are_reported(tmp_path):
    held_out = PackedBatches(text(100), 8, context=10)
    run = trainer(decoder(), 6, evaluation=held_out, eval_every=3)
    report = run.fit()
    assert [step for step, _, _ in report.evaluations] == [3, 6]
    assert report.evaluations[1][1] == run.evaluate().loss
    with pytest.raises(ValueError, match="evaluation batches were not given"):
        trainer(decoder(), 6).evaluate()


def test_nan_stops_with_the_step_and_keeps_the_parameters():
    model = decoder()
    calls = []

    def loss(model, x, y, ignore_index):
        calls.append({k: v.clone() for k, v in model.state_dict().items()})
        value = model.loss(x, y, ignore_index=ignore_index)
        return value * float("nan") if len(calls) == 4 else value

    run = trainer(model, 9, loss=loss)
    with pytest.raises(TrainingDiverged, match="the loss at step 4 is nan"):
        run.fit()
    assert run.report.step == 3
    assert all(torch.equal(v, calls[-1][k]) for k, v in model.state_dict().items())


def test_ctrl_c_saves_and_the_run_can_go_on(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_training_trainer import decoder, trainer
        from pathlib import Path
        import os, signal

        def loss(model, x, y, ignore_index):
            if run.report.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return model.loss(x, y, ignore_index=ignore_index)

        run = trainer(decoder(), 1000, Path({str(tmp_path)!r}), loss=loss)
        report = run.fit()
        print(report.step, report.interrupted)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.stdout.split() == ["6", "True"], result.stderr
    handler = signal.getsignal(signal.SIGINT)
    whole = trainer(decoder(), 9).fit()
    continued = trainer(decoder(), 9, tmp_path)
    continued.resume()
    assert continued.report.step == 6
    assert continued.fit().losses == whole.losses
    assert not continued.report.interrupted
    assert signal.getsignal(signal.SIGINT) is handler


def test_model_round_trip_is_lossless(tmp_path):
    for model in (decoder(), RecurrentLanguageModel(V, 6, 2, None), decoder().bfloat16()):
        save_model(tmp_path, model)
        loaded = load_model(tmp_path)
        for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
            assert torch.equal(a.float(), b.float()), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "cut":
        del data[-10:]
    else:
        data = bytearray(b"not what it says")
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("how", ["flip", "cut", "replace"])
def test_damaged_tensors_are_told(tmp_path, name, how):
    trainer(decoder(), 2, tmp_path, save_every=2).fit()
    path = latest_checkpoint(tmp_path)
    damaged(path / name, how)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        trainer(decoder(), 2, tmp_path).resume()


def test_damaged_or_foreign_json_is_told(tmp_path):
    save_model(tmp_path, decoder())
    config = tmp_path / "config.json"
    good = config.read_text()
    config.write_text(good[:40])
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_model(tmp_path)
    config.write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(CheckpointError, match=r"config\.json was not written by lmfast"):
        load_model(tmp_path)
    config.write_text(good.replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="has version 2, this lmfast reads 1"):
        load_model(tmp_path)
    content = json.loads(good)
    content["model"]["emb_dim"] = 32
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not hold a model of this package"):
        load_model(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"is no model directory: no config\.json"):
        load_model(tmp_path)


def test_checkpoint_of_another_model_or_data_is_refused(tmp_path):
    trainer(decoder(), 2, tmp_path, save_every=2).fit()
    with pytest.raises(CheckpointError, match="of another model: here num_blocks is 2, not 1"):
        trainer(DecoderLanguageModel(V, 16, 2, 2, 0), 4, tmp_path).resume()
    other = PackedBatches(text(300), 8, context=10, seed=1)
    with pytest.raises(CheckpointError, match="training data is not what"):
        Trainer(decoder(), other, max_steps=4, output_dir=tmp_path).resume()
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
        trainer(decoder(), 4, tmp_path / "nothing").resume()


def test_kill_while_saving_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    run = trainer(decoder(), 2, tmp_path, save_every=2)
    run.fit()

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", dies)
    run.report.step = 3
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    # What a process that was killed outright leaves behind is not taken for a checkpoint.
    (tmp_path / "checkpoints" / ".step-00000009.partial").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_a_directory_that_cannot_be_written_is_an_os_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    run = trainer(decoder(), 1, blocked)
    run.fit()
    with pytest.raises(OSError, match="file"):
        run.save()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"eval_every": -1}, "eval_every must be 0 .never. or more, got -1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 or None, got 0.0"),
        ({"clip_value": -1}, "clip_value must be above 0 or None, got -1"),
        ({"save_every": 5}, "save_every needs an output_dir"),
        ({"keep": 0}, "keep must be at least 1"),
    ],
)
def test_impossible_settings_are_named(options, message):
    batches = PackedBatches(text(), 8, context=10)
    with pytest.raises(ValueError, match=message):
        Trainer(decoder(), batches, **{"max_steps": 3, **options})
    with pytest.raises(ValueError, match="saving needs an output_dir"):
        trainer(decoder(), 1).save()
    with pytest.raises(ValueError, match="resume needs a path or an output_dir"):
        trainer(decoder(), 1).resume()


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = tmp_path / "loss.png"
    plot_losses(path, {"decoder": ([1, 2], [3.0, 2.0]), "textbook decoder": ([1, 2], [3.0, 2.0])})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_gradient_that_is_not_finite_stops_before_it_is_used():
    model, seen = decoder(), []

    def loss(model, x, y, ignore_index):
        seen.append(None)
        return model.loss(x, y, ignore_index=ignore_index)

    model.embedding.weight.register_hook(lambda g: g * math.inf if len(seen) == 3 else g)
    run = trainer(model, 5, loss=loss, clip_norm=1.0)
    with pytest.raises(TrainingDiverged, match=r"gradient at step 3 is .*, for batch 3"):
        run.fit()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    whole = trainer(decoder(), 4).fit()
    compiled = torch.compile(decoder(), backend="eager")
    trainer(compiled, 2, tmp_path, save_every=9).fit()
    assert load_model(latest_checkpoint(tmp_path)).num_parameters() > 0
    continued = trainer(torch.compile(decoder(), backend="eager"), 4, tmp_path)
    continued.resume()
    assert continued.fit().losses == whole.losses


def test_reports():
    report = TrainingReport(evaluations=[[1, 2.0, 3.0]], best=[1, 2.0])  # as JSON has them
    assert (report.evaluations, report.best) == ([(1, 2.0, 3.0)], (1, 2.0))
    report = TrainingReport(step=3)
    report.add_evaluation(math.nan, math.nan)
    assert (report.best, report.evaluations_since_best()) == (None, 1)
    report.add_evaluation(5.0, math.exp(5.0))
    assert report.best == (3, 5.0)
