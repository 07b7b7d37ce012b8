"""The command line: every command by what it prints and writes, and every bad input in one line."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch

from lmfast.cli import main
from lmfast.commands.formatting import HelpFormatter
from lmfast.models import RecurrentLanguageModel
from lmfast.tokenizer import BPETokenizer
from lmfast.training import load_model, save_model

TEXT = "".join(f"the cat number {i} sat on the mat number {i % 7}\n" for i in range(400))
SMALL = ["--vocab-size", "300", "--emb-dim", "16", "--layers", "1", "--quiet"]
STEPS = ["--steps", "6", "--batch-size", "4", "--context", "8", "--save-every", "3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a text and a trained run of each kind."""
    path = tmp_path_factory.mktemp("cli")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    for kind in ("decoder", "recurrent"):
        data = ["--data", str(path / "text.txt"), "--out", str(path / kind)]
        assert main(["train", "--model", kind, *data, *SMALL, *STEPS, "--eval-every", "2"]) == 0
    return path


def fails(capsys, arguments, message):
    """The command ends with status 1 and one line on stderr that holds the message."""
    capsys.readouterr()
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith(f"lmfast {arguments[0]}: error: ")
    assert err.count("\n") == 1


def test_train_writes_the_run(place, capsys):
    run = place / "decoder"
    assert sorted(p.name for p in run.iterdir() if p.name != "losses.png") == [
        "checkpoints", "config.json", "log.csv", "model.safetensors", "report.json", "run.json",
        "tokenizer.json",
    ]  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == [1, 2, 3, 4, 5, 6]
    assert [step for step, *_ in report["evaluations"]] == [2, 4, 6]
    assert report["losses"][-1] < report["losses"][0]
    tokenizer = BPETokenizer.load(run / "tokenizer.json")
    assert load_model(run).vocab_size == tokenizer.vocab_size
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]


def test_resume_gives_what_an_uninterrupted_run_gives(place, tmp_path, capsys):
    data = ["--data", str(place / "text.txt"), "--out"]
    assert main(["train", *data, str(tmp_path / "whole"), *SMALL, *STEPS]) == 0
    shorter = [*STEPS, "--steps", "4", "--save-every", "2"]
    assert main(["train", *data, str(tmp_path / "parts"), *SMALL, *shorter]) == 0
    assert (
        main(["train", "--out", str(tmp_path / "parts"), "--resume", "--steps", "6", "--quiet"])
        == 0
    )
    whole, parts = (load_model(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "parts")]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert "held-out loss" in capsys.readouterr().out


def test_train_on_lines_with_a_given_tokenizer(place, tmp_path, capsys):
    tokenizer = str(tmp_path / "tokenizer.json")
    data = ["--data", str(place / "text.txt")]
    assert (
        main(
            [
                "tokenizer",
                "train",
                *data,
                "--out",
                tokenizer,
                "--vocab-size",
                "120",
                "--mode",
                "char",
            ]
        )
        == 0
    )
    arguments = [
        "--out",
        str(tmp_path / "run"),
        "--tokenizer",
        tokenizer,
        "--lines",
        *SMALL[2:],
        *STEPS,
    ]
    assert (
        main(["train", *data, *arguments, "--kv-heads", "1", "--tie-weights", "--final-norm"]) == 0
    )
    model = load_model(tmp_path / "run")
    assert model.options["tie_weights"]
    assert model.options["num_kv_heads"] == 1
    capsys.readouterr()
    run = ["generate", "--model", str(tmp_path / "run"), "--max-new-tokens", "3"]
    assert main([*run, "--prompt", "the cät"]) == 0
    captured = capsys.readouterr()
    assert "prompt tokens are unknown" in captured.err
    assert captured.out.startswith("the c")
    fails(capsys, [*run, "--prompt", "   "], "the prompt is empty")


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_generate_streams_what_it_prints_at_once(place, capsys, kind):
    arguments = ["generate", "--model", str(place / kind), "--prompt", "the cat", "--seed", "3"]
    arguments += ["--max-new-tokens", "12", "--temperature", "0.9"]
    capsys.readouterr()
    assert main(arguments) == 0
    at_once = capsys.readouterr().out
    assert at_once.startswith("the cat")
    assert main([*arguments, "--stream", "--stats"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out == at_once
    assert "12 steps of 1 rows after" in streamed.err
    assert main([*arguments, "--seed", "4"]) == 0
    assert capsys.readouterr().out != at_once


def test_generate_stops_before_a_stop_text(place, capsys):
    arguments = ["generate", "--model", str(place / "decoder"), "--prompt", "the cat"]
    arguments += ["--max-new-tokens", "40"]
    capsys.readouterr()
    main(arguments)
    whole = capsys.readouterr().out.rstrip("\n")
    stop = whole[-3:]
    cut = whole[: whole.index(stop, len("the cat"))]
    for extra in ([], ["--stream"]):
        assert main([*arguments, "--stop", stop, *extra]) == 0
        assert capsys.readouterr().out.rstrip("\n") == cut.rstrip("\n")


def test_generate_from_a_checkpoint_and_several_samples(place, capsys):
    checkpoint = place / "decoder" / "checkpoints" / "step-00000003"
    capsys.readouterr()
    arguments = ["generate", "--model", str(checkpoint), "--prompt", "the", "--samples", "3"]
    assert main([*arguments, "--max-new-tokens", "2", "--top-k", "9", "--seed", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("the") >= 3


def test_tokenizer_round_trip(place, tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "t.json")
    data = str(place / "text.txt")
    assert main(["tokenizer", "train", "--data", data, "--out", path, "--vocab-size", "320"]) == 0
    assert "320 tokens from" in capsys.readouterr().out
    text = "the cat — sat €5"
    assert main(["tokenizer", "encode", "--tokenizer", path, text]) == 0
    ids = capsys.readouterr().out.split()
    assert [int(i) for i in ids] == BPETokenizer.load(path).encode(text)
    assert main(["tokenizer", "decode", "--tokenizer", path, *ids]) == 0
    assert capsys.readouterr().out == text + "\n"
    for command in ("encode", "decode"):
        result = subprocess.run(
            [sys.executable, "-m", "lmfast", "tokenizer", command, "--tokenizer", path],
            input=(text if command == "encode" else " ".join(ids)).encode(),
            capture_output=True,
            check=True,
        )
        expected = " ".join(ids) if command == "encode" else text
        assert result.stdout.decode("utf-8").rstrip("\n") == expected
    fails(
        capsys,
        ["tokenizer", "decode", "--tokenizer", path, "5", "320"],
        "ids must be in 0..319, got 320",
    )
    fails(capsys, ["tokenizer", "decode", "--tokenizer", path, "x"], "got x")
    fails(capsys, ["tokenizer", "encode", "--tokenizer", data, "x"], "text.txt")
    fails(capsys, ["tokenizer", "encode", "--tokenizer", path, "\udce9"], "the text is not UTF-8")
    capsys.readouterr()
    with monkeypatch.context() as patched:  # as for `generate --prompt -`
        patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main(["tokenizer", "encode", "--tokenizer", path, "-"]) == 0
    assert capsys.readouterr().out.split() == ids


def test_info_and_bench(tmp_path, capsys):
    assert main(["info"]) == 0
    assert "rms_norm" in capsys.readouterr().out
    figures = tmp_path / "bench.json"
    arguments = ["--scale", "64", "--repeats", "1", "--json", str(figures)]
    for extra in ([], ["--backward"], ["--dtype", "bf16"]):
        assert main(["bench", *arguments, *extra]) == 0
        assert len(json.loads(figures.read_text())) == 4
        assert "linear_cross_entropy" in capsys.readouterr().out
    fails(capsys, ["bench", "softmax"], "no benchmark named 'softmax'; there are rms_norm,")


def test_train_input_that_cannot_be_used(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), *SMALL]
    fails(capsys, ["train", *out], "--data is needed")
    fails(capsys, ["train", *out, "--data", str(tmp_path / "no.txt")], "no.txt: No such file")
    fails(capsys, ["train", *out, "--data", str(tmp_path)], "is a directory")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    fails(
        capsys,
        ["train", *out, "--data", str(tmp_path / "latin.txt")],
        "is not UTF-8 text: byte 0xe9",
    )
    (tmp_path / "empty.txt").write_text(" \n\n")
    fails(capsys, ["train", *out, "--data", str(tmp_path / "empty.txt")], "there is no text in")
    tokenizer = ["tokenizer", "train", "--out", str(tmp_path / "t.json"), "--data"]
    fails(capsys, [*tokenizer, str(tmp_path / "empty.txt")], "there is no text in")
    text = ["--data", str(place / "text.txt")]
    fails(capsys, ["train", *out, *text, "--heads", "3"], "emb_dim 16 must be a multiple of")
    fails(capsys, ["train", *out, *text, "--device", "cuda:99"], "--device cuda:99 cannot be used")
    fails(capsys, ["train", *text, "--out", str(place / "decoder"), *SMALL], "holds a run already")
    fails(capsys, ["train", "--out", str(tmp_path / "none"), "--resume"], "no run to continue")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run.json").write_text("{")
    fails(capsys, ["train", "--out", str(tmp_path), "--resume"], "run.json is damaged")


def test_generate_input_that_cannot_be_used(place, tmp_path, capsys, monkeypatch):
    prompt = ["--prompt", "the", "--max-new-tokens", "2"]
    fails(capsys, ["generate", "--model", str(tmp_path), *prompt], "no config.json")
    model = ["generate", "--model", str(place / "decoder")]
    fails(capsys, [*model, "--prompt", ""], "the prompt is empty")
    fails(capsys, [*model, "--prompt", "\udcff"], "the prompt is not UTF-8 text")
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the \xff"), "utf-8"))
        fails(capsys, [*model, "--prompt", "-"], "the prompt is not UTF-8 text")
    fails(capsys, [*model, *prompt, "--stream", "--samples", "2"], "--stream shows one")
    save_model(tmp_path / "alone", RecurrentLanguageModel(20, 4, 1, 0))
    alone = ["generate", "--model", str(tmp_path / "alone"), *prompt]
    fails(capsys, alone, "holds no tokenizer.json")
    BPETokenizer.load(place / "decoder" / "tokenizer.json").save(tmp_path / "tokenizer.json")
    fails(capsys, alone, "has 300 tokens, its model 20")
    weights = tmp_path / "alone" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fails(capsys, alone, "model.safetensors is damaged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["tokenizer"], "ACTION"),
        (["generate", "--prompt", "x"], "--model"),
        (
            ["generate", "--model", "x", "--prompt", "x", "--top-p", "2"],
            "2 is not a number above 0",
        ),
        (
            ["generate", "--model", "x", "--prompt", "x", "--top-k", "a"],
            "'a' is not a whole number",
        ),
        (
            ["generate", "--model", "x", "--prompt", "x", "--seed", "9" * 20],
            "of at least 0 and at most 1e+18",
        ),
        (["train", "--out", "x", "--steps", "0"], "0 is not a whole number of at least 1"),
        (
            ["tokenizer", "train", "--data", "x", "--out", "/"],
            "argument --out: / is a directory, not a file to write",
        ),
        (["profile", "--trace", "/nonexistent/t.json"], "no directory /nonexistent"),
        (["bench", "--json", "/nonexistent/t.json"], "no directory /nonexistent"),
        (["info", "more"], "unrecognized arguments: more"),
        (
            ["generate", "--model", "x", "--prompt", "x", "--threads", "100000"],
            "100000 is not a whole number of at least 1 and at most 4096",
        ),
        (
            ["generate", "--model", "x", "--prompt", "x", "--seed", str(10**20)],
            f"{10**20} is not a whole number of at least 0 and at most 1e+18",
        ),
        (
            ["chat", "--model", "x", "--presence-penalty", "nan"],
            "nan is not a number of at least -1e+18",
        ),
        (["demo", "--precision", "low"], "invalid choice: 'low'"),
        (
            ["generate", "--model", "x", "--prompt", "x", "--max-tokens", "3"],
            "lmfast generate: error: unrecognized arguments: --max-tokens 3; "
            "did you mean --max-new-tokens?",
        ),
    ],
)
def test_wrong_command_lines_end_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["demo", "train", "finetune", "generate", "chat", "tokenizer", "info", "bench", "profile"],
)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "usage: lmfast " + command in out
    assert "None" not in out
    assert "(default: )" not in out
    assert not re.search(r"\(default: \S+\)\s+\(default", out)
    assert ") (default" not in " ".join(out.split())  # said once


def test_help_shows_defaults_only_where_there_are_any():
    import argparse

    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--size", default=3, help="how big")
    parser.add_argument("--name", help="what it is called")
    parser.add_argument("--fast", action="store_true", help="go fast")
    text = parser.format_help()
    assert "how big (default: 3)" in text
    assert text.count("default") == 1


def test_version_and_traceback(place, capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("lmfast 0.")
    with pytest.raises(ValueError, match="the prompt is empty"):
        main(["generate", "--model", str(place / "decoder"), "--prompt", "", "--traceback"])


def test_closed_output_is_not_an_error_report(place):
    tokenizer = str(place / "decoder" / "tokenizer.json")
    command = f"{sys.executable} -m lmfast tokenizer encode --tokenizer {tokenizer} | head -c 0"
    result = subprocess.run(
        ["bash", "-c", command], input=TEXT.encode() * 20, capture_output=True, check=False
    )
    assert result.stderr == b""
