"""`lmfast train`: its sources of text, ways of training, outputs, and options that exclude each
other."""

import csv
import gzip
import json
import os
import signal

import pytest
import torch

from lmfast.cli import main
from lmfast.training import load_model
from lmfast.training.steps import Stepper

LINES = [f"the cat number {i} sat on the mat number {i % 7}" for i in range(400)]
SMALL = ["--vocab-size", "300", "--emb-dim", "16", "--layers", "1", "--quiet"]
STEPS = ["--steps", "6", "--batch-size", "4", "--context", "8", "--save-every", "3"]


@pytest.fixture
def place(tmp_path):
    """A directory with the same texts in several forms."""
    (tmp_path / "text.txt").write_text("\n".join(LINES) + "\n")
    with (tmp_path / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"body": line}) + "\n" for line in LINES)
    (tmp_path / "held-out.txt").write_text("\n".join(LINES[:40]) + "\n")
    return tmp_path


def run(place, name, data, *options):
    assert main(["train", "--data", str(place / data), "--out", str(place / name), *SMALL, *STEPS,
                 *options]) == 0  # fmt: skip
    return json.loads((place / name / "report.json").read_text())


def fails(capsys, arguments, message):
    """The command ends with status 1 and one line on stderr that holds the message."""
    capsys.readouterr()
    assert main(["train", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_ways_to_the_same_text_learn_the_same(place):
    datasets = pytest.importorskip("datasets", reason="needs the datasets package")
    datasets.Dataset.from_dict({"body": LINES}).save_to_disk(place / "disk")
    field = ["--text-field", "body", "--eval-data", str(place / "text.jsonl"), "--add-eos"]
    expected = run(place, "jsonl", "text.jsonl", *field)
    dataset = run(place, "dataset", "disk", *field)
    assert dataset["losses"] == expected["losses"]
    assert dataset["evaluations"] == expected["evaluations"]
    streamed = run(place, "stream", "text.jsonl", *field, "--stream", "--buffer", "9999")
    assert streamed["tokens"] == expected["tokens"]
    assert streamed["losses"][0] == pytest.approx(expected["losses"][0], abs=0.2)


def test_lines_are_examples_or_one_long_text(place):
    texts = run(place, "texts", "text.txt", "--lines", "--context", "99", "--held-out", "0.5")
    windows = run(place, "windows", "text.txt", "--lines", "--examples", "windows")
    assert windows["tokens"] == 6 * 4 * 8
    assert texts["tokens"] > windows["tokens"]


def test_compressed_text_is_text(place):
    for name in ("text.txt", "text.jsonl"):
        (place / f"{name}.gz").write_bytes(gzip.compress((place / name).read_bytes()))
    field = ["--text-field", "body", "--stream"]
    for name, options in (("text.txt", []), ("text.jsonl", field)):
        plain, packed = (run(place, f"{file}-run", file, *options) for file in (name, f"{name}.gz"))
        assert packed["losses"] == plain["losses"]
    out = ["--out", str(place / "text.jsonl.gz-run"), "--resume", "--quiet", "--steps", "8"]
    assert main(["train", *out]) == 0


def test_everything_at_once(place):
    options = ["--stream", "--workers", "1", "--schedule", "cosine", "--warmup", "2"]
    options += ["--min-learning-rate", "1e-4", "--accumulate", "3", "--clip-norm", "1"]
    options += ["--recompute", "--autocast", "--eval-every", "2", "--eval-batches", "1"]
    options += ["--eval-data", str(place / "held-out.txt"), "--keep", "1", "--deterministic"]
    try:
        report = run(place, "all", "text.txt", *options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [step for step, *_ in report["evaluations"]] == [2, 4, 6]
    rows = list(csv.DictReader((place / "all" / "log.csv").open()))
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[:2] == [5e-4, 1e-3]
    assert rates[-1] == pytest.approx(1e-4)
    assert all(float(row["gradient_norm"]) > 0 for row in rows)
    assert [p.name for p in (place / "all" / "checkpoints").iterdir()] == ["step-00000006"]


def test_carried_state(place):
    options = ["--model", "recurrent", "--carry-state", "--eval-every", "3"]
    whole = run(place, "whole", "text.txt", *options)
    run(place, "parts", "text.txt", *options, "--steps", "3")
    out = str(place / "parts")
    assert main(["train", "--out", out, "--resume", "--steps", "6", "--quiet"]) == 0
    parts = json.loads((place / "parts" / "report.json").read_text())
    assert parts["losses"] == whole["losses"]
    assert parts["evaluations"] == whole["evaluations"]


def test_what_may_be_other_when_a_run_goes_on(place, capsys):
    """--steps, kept for the next time; anything else that differs is told, and the model stays."""
    whole = run(place, "eight", "text.txt", "--steps", "8")
    run(place, "on", "text.txt")
    out = ["--out", str(place / "on"), "--resume", "--quiet"]
    other = str(place / "text.jsonl")
    for typed, told in (
        (["--emb-dim", "20"], "--emb-dim 20 is not what"),
        (["--emb-dim", "128"], "--emb-dim 128 is not what"),  # the default, typed all the same
        (["--batch-size=64"], "--batch-size 64 is not what"),
        (["--epochs", "1"], "--epochs 1.0 has no effect beside --steps 6"),
        (["--data", other], f"--data {other} is not what"),
        (["--precision", "medium"], "was started with, highest: leave it out"),
        (["--steps", "5"], "--steps 5 is less than the 6 that"),
    ):
        fails(capsys, [*out, *typed], told)
    same = ["--data", str(place / "text.txt"), *SMALL]
    assert main(["train", *out, *same, "--steps", "8"]) == 0
    assert ", on from step " in capsys.readouterr().out
    assert json.loads((place / "on" / "run.json").read_text())["settings"]["steps"] == 8
    assert main(["train", *out]) == 0  # ended already: nothing is lost
    report = json.loads((place / "on" / "report.json").read_text())
    assert report["losses"] == whole["losses"]


def test_early_stopping_gives_the_best_model(place, capsys):
    # With such steps the second evaluation cannot be better than the first ones.
    options = ["--learning-rate", "3", "--eval-every", "1", "--patience", "2", "--steps", "40"]
    report = run(place, "early", "text.txt", *options)
    step = report["best"][0]
    assert f"step {step} was the best" in capsys.readouterr().out
    assert len(report["steps"]) == step + 2
    best = load_model(place / "early" / "checkpoints" / f"step-{step:08d}").state_dict()
    result = load_model(place / "early").state_dict()
    assert all(torch.equal(best[name], result[name]) for name in best)


def test_bad_lines_are_named_and_left_out_on_request(place, capsys):
    with (place / "text.jsonl").open("a") as file:
        file.write('{"body": 1}\n')
    out = ["--out", str(place / "bad"), "--data", str(place / "text.jsonl"), *SMALL, *STEPS]
    field = ["--text-field", "body"]
    fails(
        capsys, [*out, *field], "text.jsonl:401: field 'body' holds a value of type int, not text"
    )
    with pytest.warns(UserWarning, match=r"left out: .*text\.jsonl:401"):
        assert main(["train", *out, *field, "--bad-lines", "skip"]) == 0
    assert "1 bad lines were left out" in capsys.readouterr().err


def test_a_run_shorter_than_save_every_goes_on(place):
    whole = run(place, "whole", "text.txt", "--save-every", "3")
    assert len(whole["losses"]) == 6
    run(place, "short", "text.txt", "--steps", "4", "--save-every", "200")
    out = str(place / "short")
    assert main(["train", "--out", out, "--resume", "--steps", "6", "--quiet"]) == 0
    assert json.loads((place / "short" / "report.json").read_text())["losses"] == whole["losses"]
    run(place, "none", "text.txt", "--save-every", "0")
    assert not (place / "none" / "checkpoints").exists()


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_the_status_tells_the_signal(place, monkeypatch, command):
    step = Stepper.step

    def stopped(self, number, *args):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *args)

    run(place, "model", "text.txt")
    (place / "pairs.jsonl").write_text('{"prompt": "the", "completion": "cat"}\n' * 99)
    monkeypatch.setattr(Stepper, "step", stopped)
    options = {
        "train": ["--data", str(place / "text.txt"), *SMALL, *STEPS],
        "finetune": ["--model", str(place / "model"), "--data", str(place / "pairs.jsonl")],
    }
    out = place / "stopped"
    assert main([command, "--out", str(out), *options[command], "--quiet"]) == 128 + 15
    assert (out / "checkpoints" / "step-00000002").is_dir() == (command == "train")


def test_cells_and_tied_weights_of_recurrent_models(place, capsys):
    options = ["--model", "recurrent", "--cell", "lstm", "--tie-weights", "--carry-state"]
    run(place, "lstm", "text.txt", *options)
    model = load_model(place / "lstm")
    assert (model.options["cell"], model.options["tie_weights"]) == ("lstm", True)
    assert "longer" not in capsys.readouterr().err
    (place / "short.txt").write_text("the cat sat")
    for name, extra in (("carried", options), ("windows", [])):
        run(place, name, "short.txt", *extra, "--batch-size", "1", "--context", "9999")
        assert "--context 9999 is longer than the text: examples of" in capsys.readouterr().err


def test_a_batch_larger_than_the_text_is_told(place, capsys):
    run(place, "lines", "text.txt", "--lines", "--held-out", "0.5", "--batch-size", "201")
    assert "--batch-size 201 is more than the text's examples: 200" in capsys.readouterr().err
    run(place, "enough", "text.txt", "--lines", "--held-out", "0.5", "--batch-size", "200")
    assert "more than" not in capsys.readouterr().err


def test_data_that_changed_is_told(place, capsys):
    for name, extra in (("memory", []), ("stream", ["--stream"])):
        run(place, name, "text.txt", *extra)
    text = (place / "text.txt").read_text()
    (place / "text.txt").write_text(text.replace("number 5 ", "number 6 "))
    for name in ("memory", "stream"):
        resume = ["--out", str(place / name), "--resume", "--steps", "9", "--quiet"]
        fails(capsys, resume, "training data is not what the checkpoint was trained on")


def test_options_that_exclude_each_other(place, capsys):
    out = ["--out", str(place / "run"), *SMALL]
    text = [*out, "--data", str(place / "text.txt")]
    jsonl = [*out, "--data", str(place / "text.jsonl"), "--text-field", "body"]
    (place / "empty.txt").write_text(" \n")
    (place / "text.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00")
    (place / "text.gz").write_bytes(gzip.compress(b"a\n" * 99)[:-9])
    cases = [
        ([*text, "--carry-state"], "--carry-state is for --model recurrent, not decoder"),
        ([*text, "--model", "recurrent", "--carry-state", "--stream"], "excludes --lines"),
        ([*jsonl, "--model", "recurrent", "--carry-state"], "reads one long text"),
        ([*text, "--model", "recurrent", "--recompute"], "--recompute is for --model decoder"),
        ([*text, "--model", "recurrent", "--final-norm"], "--final-norm is for --model decoder"),
        ([*text, "--model", "recurrent", "--heads", "8"], "--heads 8 is for --model decoder, not"),
        ([*text, "--stream", "--held-out", "0.1"], "--held-out needs the end of the text"),
        ([*text, "--buffer", "9"], "--buffer 9 is for --stream"),
        ([*text, "--eval-data", "x", "--held-out", "0.1"], "exclude each other"),
        ([*text, "--patience", "2", "--eval-every", "0"], "--patience needs --eval-every"),
        ([*text, "--patience", "2", "--held-out", "0"], "--patience 2 needs texts to evaluate on"),
        ([*text, "--eval-every", "200", "--held-out", "0"], "--eval-every 200 needs texts"),
        ([*text, "--keep", "2", "--save-every", "0"], "--keep 2 has no effect beside"),
        ([*text, "--min-learning-rate", "1e-5"], "needs --schedule linear or cosine"),
        (
            [*text, "--schedule", "linear", "--min-learning-rate", "1"],
            "--min-learning-rate 1 is above --learning-rate 0.001",
        ),
        ([*text, "--warmup", "99", "--steps", "9"], "--warmup 99 is longer than the run: 9 steps"),
        ([*text, "--steps", "9", "--epochs", "1"], "--epochs 1.0 has no effect beside --steps 9"),
        ([*text, "--tokenizer", "x"], "--vocab-size 300 is of a new tokenizer"),
        ([*text, "--cell", "lstm"], "--cell lstm is for --model recurrent"),
        ([*text, "--text-field", "text"], "--text-field text is of JSON lines"),
        ([*text, "--held-out", "1e-9"], "--held-out 1e-09 of this text is nothing"),
        ([*text, "--eval-data", str(place / "empty.txt")], "there is no text in"),
        ([*out, "--data", str(place)], "is a directory of no data set"),
        ([*out, "--data", str(place / "text.zst")], "compressed: unpack it first, with unzstd"),
        ([*out, "--data", str(place / "text.gz")], "text.gz is compressed and damaged: "),
        ([*text, "--add-eos"], "--add-eos needs separate texts"),
        ([*text, "--examples", "texts"], "--examples texts needs separate texts"),
        ([*text, "--data", str(place / "text.txt"), str(place / "text.jsonl")], "of one kind"),
    ]
    for arguments, message in cases:
        fails(capsys, arguments, message)
    assert not (place / "run").exists()


def test_tensorboard_files(place):
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    run(place, "board", "text.txt", "--tensorboard")
    assert list((place / "board" / "tensorboard").glob("events.out.*"))
