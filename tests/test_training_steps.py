"""What a step is made of: schedules, accumulation, clipping, precision, carried states, memory."""

import csv
import itertools

import pytest
import torch
from torch import nn

from lmfast import _extension
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel
from lmfast.models.textbook import TextbookRecurrent, textbook_loss
from lmfast.training import (
    ContiguousBatches,
    CsvLog,
    PackedBatches,
    PaddedBatches,
    Schedule,
    Trainer,
    TrainingDiverged,
)
from lmfast.training.objective import recomputed_blocks

V = 13


def text(length=400, seed=0):
    return torch.randint(1, V, (length,), generator=torch.Generator().manual_seed(seed))


def ragged():
    """Texts of 2 to 12 tokens: parts of a batch have different numbers of targets."""
    ids = text(400)
    bounds = [0]
    while bounds[-1] < 380:
        bounds.append(bounds[-1] + 2 + len(bounds) * 7 % 11)
    rows = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    return PaddedBatches(rows, 8, max_length=11, seed=1)


def decoder():
    torch.manual_seed(0)
    return DecoderLanguageModel(V, 16, 2, 2, 0)


def recurrent(num_layers=2):
    torch.manual_seed(0)
    return RecurrentLanguageModel(V, 16, num_layers, 0)


def train(model, batches, steps=6, **options):
    options = {"progress": False, "learning_rate": 1e-2, **options}
    trainer = Trainer(model, batches, max_steps=steps, **options)
    return trainer, trainer.fit()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_schedules():
    total, warm = 20, 5
    for kind in ("constant", "linear", "cosine"):
        schedule = Schedule(kind, total_steps=total, warmup_steps=warm, floor=0.1)
        assert [schedule.factor(s) for s in range(1, 6)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    torch.testing.assert_close(Schedule("linear", 20, 5, 0.1).factor(8), 0.1 + 0.9 * 12 / 15)
    assert Schedule("constant", 20).factor(99) == 1
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=0.1)
    schedule = Schedule("cosine", total, floor=0.1)
    for step in range(1, total + 1):
        optimizer.step()
        peer.step()
        assert schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    for options, message in (
        ({"kind": "step"}, "kind must be one of constant, linear, cosine, got 'step'"),
        ({"total_steps": 3, "warmup_steps": 4}, r"warmup_steps must be in 0..total_steps \(3\)"),
        ({"floor": 2}, r"floor must be in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule(**options)


def test_learning_rate_follows_the_schedule():
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    model = recurrent()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}]
    schedule = Schedule("linear", 4, 2)
    train(model, ragged(), 5, optimizer=Watched(groups, lr=0.1), schedule=schedule)
    expected = [0.5, 1.0, 0.5, 0.0, 0.0]
    assert rates == [[pytest.approx(0.1 * f), pytest.approx(0.5 * f)] for f in expected]


@pytest.mark.parametrize("parts", [2, 3, 8, 11])
def test_accumulated_parts_make_the_step_of_the_whole_batch(parts):
    # 11 parts of 8 rows: some are empty. SGD, because Adam would blow up rounding of tiny
    # gradients; fp64, so that only a wrong weight can make a difference.
    def sgd(model):
        return torch.optim.SGD(model.parameters(), 0.5)

    whole, divided = decoder().double(), decoder().double()
    _, expected = train(whole, ragged(), optimizer=sgd(whole), clip_norm=0.5)
    _, report = train(divided, ragged(), optimizer=sgd(divided), clip_norm=0.5, accumulate=parts)
    assert report.losses == pytest.approx(expected.losses, rel=1e-12)
    assert report.tokens == expected.tokens
    for a, b in zip(divided.parameters(), whole.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_clipping_bounds_the_norm_and_reports_it(tmp_path):
    model = decoder()
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for p in model.parameters()]
            norms.append(torch.stack([g.norm() for g in grads]).norm().item())
            return super().step(closure)

    log = CsvLog(tmp_path / "log.csv")
    optimizer = Watched(model.parameters(), 0.5)
    train(model, ragged(), optimizer=optimizer, clip_norm=0.3, logs=[log])
    assert norms == pytest.approx([0.3] * 6, rel=1e-5)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert all(float(row["gradient_norm"]) > 0.3 for row in rows)


def full_bptt(model, ids, rows, width):
    """Plain back-propagation through all of each row, with textbook code: one step per epoch."""
    textbook = TextbookRecurrent(V, 16, 2, 0)
    textbook.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(textbook.parameters(), 0.5)
    inputs = ids[:-1].view(rows, width)
    targets = ids[1:].view(rows, width)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = textbook_loss(textbook, inputs, targets, -100)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, textbook


def test_truncated_bptt_through_the_whole_text_is_bptt():
    ids, model = text(4 * 9 + 1), recurrent()
    expected, textbook = full_bptt(model, ids, 4, 9)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    _, report = train(model, ContiguousBatches(ids, 4, context=9), 3, optimizer=optimizer)
    # fp32 in another order of summation.
    assert report.losses == pytest.approx(expected, rel=1e-5)
    for a, b in zip(model.parameters(), textbook.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_truncated_bptt_carries_states_and_starts_epochs_anew(accumulate):
    # Without learning the losses of pieces are those of the whole rows, in every epoch.
    ids, model = text(4 * 9 + 1), recurrent()
    batches = ContiguousBatches(ids, 4, context=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    evaluation = ContiguousBatches(ids, 4, context=2)
    trainer, report = train(
        model,
        batches,
        7,
        optimizer=optimizer,
        accumulate=accumulate,
        evaluation=evaluation,
    )
    with torch.no_grad():
        rows = model(ids[:-1].view(4, 9)).log_softmax(-1)
        nll = -rows.gather(-1, ids[1:].view(4, 9, 1))[..., 0]
    pieces = [nll[:, :4].mean(), nll[:, 4:8].mean(), nll[:, 8:].mean()]
    assert report.losses == pytest.approx(
        [p.item() for p in [*pieces, *pieces, pieces[0]]], rel=1e-5
    )
    assert trainer.evaluate().loss == pytest.approx(nll.mean().item(), rel=1e-5)


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_truncated_bptt_resumes_with_its_state(tmp_path, steps):
    def make():
        return ContiguousBatches(text(200), 4, context=10)

    expected = recurrent()
    _, whole = train(expected, make(), 9)
    train(recurrent(), make(), steps, save_every=steps, output_dir=tmp_path, accumulate=2)
    model = recurrent()
    trainer = Trainer(model, make(), max_steps=9, output_dir=tmp_path, progress=False)
    trainer.resume()  # in one part instead of two: the states of both
    assert trainer.fit().losses == pytest.approx(whole.losses, rel=1e-4)
    train(recurrent(), make(), steps, save_every=steps, output_dir=tmp_path / "same")
    model = recurrent()
    trainer = Trainer(
        model,
        make(),
        max_steps=9,
        output_dir=tmp_path / "same",
        learning_rate=1e-2,
        progress=False,
    )
    trainer.resume()
    assert trainer.fit().losses == whole.losses
    assert same(model, expected)


def test_autocast_computes_in_bf16_and_keeps_fp32_parameters():
    seen = []

    def loss(model, x, y, ignore_index):
        seen.append((model.embedding.weight.dtype, torch.get_autocast_dtype("cpu")))
        assert torch.is_autocast_enabled("cpu")
        return model.loss(x, y, ignore_index=ignore_index)

    reports = []
    for options in ({}, {"autocast": torch.bfloat16, "loss": loss}):
        model = recurrent()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        reports.append(train(model, ragged(), 20, optimizer=optimizer, **options)[1])
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    # bf16 has 8 bits: the losses agree to 2 digits.
    assert reports[1].losses == pytest.approx(reports[0].losses, abs=2e-2)
    if _extension.has_bf16_tiles():  # elsewhere the layers compute in fp32 all the same
        assert reports[1].losses != reports[0].losses
    assert not torch.is_autocast_enabled("cpu")


def test_recomputed_blocks_give_the_same_gradients_in_less_memory():
    plain, recomputed = decoder(), decoder()
    _, expected = train(plain, ragged())
    kept = []

    def loss(model, x, y, ignore_index):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
        ):
            value = model.loss(x, y, ignore_index=ignore_index)
        kept.append(len(set(saved)))
        return value

    _, report = train(recomputed, ragged(), recompute=True, loss=loss)
    assert report.losses == expected.losses
    assert same(plain, recomputed)
    with_recompute = kept[0]
    train(decoder(), ragged(), 1, loss=loss)
    assert with_recompute < kept[-1] / 2  # tensors kept for the backward pass
    assert all("forward" not in vars(layer) for layer in recomputed.layers)  # as it was before


def test_recomputed_blocks_take_named_arguments_and_get_their_own_forward_back():
    class Block(torch.nn.Linear):
        def forward(self, x, *, scale=1.0):
            return super().forward(x) * scale

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Block(3, 3) for _ in range(2))
    patched = model.layers[1].forward = lambda x, *, scale: x * scale
    x = torch.randn(2, 3, requires_grad=True)

    def run():
        y = x
        for layer in model.layers:
            y = layer(y, scale=3.0)
        return torch.autograd.grad(y.square().sum(), [x, model.layers[0].weight])

    expected = run()
    with recomputed_blocks(model, enabled=True):
        found = run()
    for f, e in zip(found, expected):
        assert torch.equal(f, e)
    assert "forward" not in vars(model.layers[0])
    assert model.layers[1].forward is patched


@pytest.mark.parametrize("every", [1, 10])
def test_divergence_names_the_step_and_the_batch(every):
    """every = 10: losses are read late, as on a GPU."""
    model, batches = decoder(), ragged()
    calls = []

    def loss(model, x, y, ignore_index):
        calls.append(batches.where())
        value = model.loss(x, y, ignore_index=ignore_index)
        return value * float("inf") if len(calls) == 4 else value

    run = Trainer(model, batches, max_steps=25, loss=loss, progress=False)
    run._stepper.settles_at_once = every == 1
    with pytest.raises(TrainingDiverged, match="the loss at step 4 is inf, for batch 4 of epoch 1"):
        run.fit()
    assert calls[3].startswith("batch 4 of epoch 1, examples ")
    assert len(calls) == (4 if every == 1 else 10)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (recurrent, {"recompute": True}, "recompute needs a model with its blocks in `layers`"),
        (decoder, {"autocast": torch.float16}, "autocast must be torch.bfloat16 or None"),
        (decoder, {"accumulate": 0}, "accumulate must be at least 1, got 0"),
        (decoder, {"patience": 2}, "patience needs evaluation batches and eval_every"),
        (decoder, {"shard": True}, "shard needs several processes: start them with torchrun"),
    ],
)
def test_settings_that_do_not_go_together(model, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(model(), ragged(), max_steps=3, **options)


def test_carried_states_need_a_recurrent_model_and_enough_rows():
    batches = ContiguousBatches(text(99), 2, context=5)
    with pytest.raises(ValueError, match=r"ContiguousBatches carry a state .* got Decoder"):
        Trainer(decoder(), batches, max_steps=3)
    with pytest.raises(
        ValueError, match="a batch of 2 rows cannot be divided into 1 processes x 3"
    ):
        train(recurrent(), batches, 3, accumulate=3)
    with pytest.raises(ValueError, match="the best checkpoint needs evaluations"):
        Trainer(decoder(), ragged(), max_steps=3).load_best()
    with pytest.raises(ValueError, match="patience needs an output_dir"):
        Trainer(decoder(), ragged(), max_steps=3, evaluation=ragged(), eval_every=1, patience=1)


def test_trainer_and_batches_name_what_they_cannot_take():
    ids = torch.arange(60) % 13
    batches = PackedBatches(ids, 4, context=5)
    model = DecoderLanguageModel(13, 16, 2, 1, 0)
    with pytest.raises(TypeError, match="ids must be a tensor of integers, got list"):
        PackedBatches([1, 2, 3], 4, context=5)
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        ContiguousBatches(ids.float(), 4, context=5)
    with pytest.raises(ValueError, match=r"got shape \(1, 60\)"):
        PackedBatches(ids[None], 4, context=5)
    with pytest.raises(TypeError, match="Linear has none"):
        Trainer(torch.nn.Linear(2, 2), batches, max_steps=1)
    with pytest.raises(TypeError, match=r"Batches of lmfast\.training, got list"):
        Trainer(model, [ids], max_steps=1)
    with pytest.raises(ValueError, match="all are frozen"):
        Trainer(model.requires_grad_(False), batches, max_steps=1)
