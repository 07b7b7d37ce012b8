"""Early stopping and logs: what a run keeps and writes down."""

import csv
import io
import itertools
import math
import os
import re
import signal
import sys
import time

import pytest
import torch

from lmfast.models import DecoderLanguageModel
from lmfast.training import CsvLog, PaddedBatches, TensorBoardLog, Trainer

V = 13


def ragged():
    """Texts of 2 to 12 tokens."""
    ids = torch.randint(1, V, (400,), generator=torch.Generator().manual_seed(0))
    bounds = list(itertools.accumulate(range(50), lambda end, n: end + 2 + n * 7 % 11))
    return PaddedBatches([ids[a:b] for a, b in itertools.pairwise(bounds)], 8, max_length=11)


def decoder():
    torch.manual_seed(0)
    return DecoderLanguageModel(V, 16, 2, 2, 0)


def train(model, batches, steps, **options):
    options = {"progress": False, "learning_rate": 1e-2, **options}
    trainer = Trainer(model, batches, max_steps=steps, **options)
    return trainer, trainer.fit()


def evaluations(trainer, losses):
    """Let evaluations find these losses, one after the other."""
    values = iter(losses)
    original = trainer.report.add_evaluation

    def add(loss, perplexity):
        value = next(values)
        original(value, math.exp(value))

    trainer.report.add_evaluation = add


def test_early_stopping_keeps_the_best_checkpoint(tmp_path):
    trainer = Trainer(
        decoder(),
        ragged(),
        max_steps=99,
        evaluation=ragged(),
        eval_every=2,
        patience=3,
        save_every=1,
        output_dir=tmp_path,
        progress=False,
    )
    evaluations(trainer, [2.0, 1.5, 1.7, 1.5, 1.6])
    snapshots = {}
    step = trainer.optimizer.step

    def remember(*args):
        step(*args)
        snapshots[trainer.report.step + 1] = [p.clone() for p in trainer.model.parameters()]

    trainer.optimizer.step = remember
    report = trainer.fit()
    assert (report.step, report.stopped_early, report.best) == (10, True, (4, 1.5))
    names = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000004", "step-00000009", "step-00000010"]
    assert trainer.load_best() == 4
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), snapshots[4]))
    again = Trainer(
        decoder(),
        ragged(),
        max_steps=99,
        evaluation=ragged(),
        eval_every=2,
        patience=3,
        output_dir=tmp_path,
        progress=False,
    )
    again.resume()
    assert again.fit().step == 10  # it has had its patience


def test_csv_log_of_a_resumed_run_is_that_of_one_run(tmp_path):
    def rows(path):
        return [
            {k: v for k, v in row.items() if k != "tokens_per_second"}
            for row in csv.DictReader(path.open())
        ]

    options = {"evaluation": ragged(), "eval_every": 3, "clip_norm": 1.0}
    _, report = train(decoder(), ragged(), 9, logs=[CsvLog(tmp_path / "whole.csv")], **options)
    log = CsvLog(tmp_path / "log.csv")
    run = {"output_dir": tmp_path, "save_every": 4, **options}
    train(decoder(), ragged(), 6, logs=[log], **run)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("7,1")  # cut short
    trainer = Trainer(
        decoder(), ragged(), max_steps=9, logs=[log], progress=False, learning_rate=1e-2, **run
    )
    trainer.resume()
    trainer.fit()
    assert rows(tmp_path / "log.csv") == rows(tmp_path / "whole.csv")
    written = rows(tmp_path / "log.csv")
    assert [float(row["loss"]) for row in written] == pytest.approx(report.losses, rel=1e-7)
    assert [row["step"] for row in written if row["held_out_loss"]] == ["3", "6", "9"]
    assert float(written[0]["learning_rate"]) == 1e-2


def test_tensorboard_log(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, report = train(decoder(), ragged(), 4, logs=[TensorBoardLog(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(report.losses, rel=1e-6)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_shows_rate_and_time_left(monkeypatch):
    """What it says fits together: time left = steps left / steps per second."""

    def slow(model, x, y, ignore_index):
        time.sleep(0.11)  # it is drawn ten times a second
        if len(losses) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        losses.append(model.loss(x, y, ignore_index=ignore_index))
        return losses[-1]

    losses = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    _, report = train(decoder(), ragged(), 1000, loss=slow, progress=True, description="slow")
    assert report.interrupted
    last = sys.stderr.getvalue().split("\r")[-1].strip()
    shown = re.fullmatch(
        r"slow: +0%\|.*\| (\d+)/1000 \[\d+:\d+<([\d:]+), +([\d.]+)(s/step|step/s), "
        r"loss ([\d.]+), ([\d,]+) tokens/s\]",
        last,
    )
    assert shown, last
    done, left, rate, unit, loss, tokens = shown.groups()
    assert int(done) == report.step == 5
    seconds = sum(int(x) * 60**i for i, x in enumerate(reversed(left.split(":"))))
    per_step = float(rate) if unit == "s/step" else 1 / float(rate)
    assert seconds == pytest.approx((1000 - 5) * per_step, rel=0.05)  # of a rate of 2 digits
    assert float(loss) == pytest.approx(sum(report.losses) / 5, abs=1e-3)
    assert int(tokens.replace(",", "")) == pytest.approx(report.rates[-1], abs=1)


def test_losses_read_late_are_those_of_every_step(tmp_path):
    _, expected = train(decoder(), ragged(), 25)
    log = CsvLog(tmp_path / "log.csv")
    run = Trainer(decoder(), ragged(), max_steps=25, learning_rate=1e-2, logs=[log], progress=False)
    run._stepper.settles_at_once = False  # as on a GPU
    report = run.fit()
    assert report.losses == expected.losses
    assert (report.steps, report.tokens) == (expected.steps, expected.tokens)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 26))
    assert len(report.rates) == 3
