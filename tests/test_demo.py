"""The demo: its text, its files and figures in the quick form, agreement, bad input."""

import json
import os
import subprocess
import sys

import pytest

from lmfast.cli import main
from lmfast.demo.corpus import interpreter_documentation
from lmfast.demo.report import largest_difference, ratios, table
from lmfast.tokenizer import BPETokenizer
from lmfast.training import load_model


def test_documentation_is_large_english_and_the_same_every_time():
    text = interpreter_documentation(300_000)
    assert 300_000 <= len(text) < 600_000
    assert text == interpreter_documentation(300_000)
    assert 1_000 <= len(interpreter_documentation(1_000)) < len(text)
    assert text.count("Return") > 100
    entries = text.split("\n\n\n")
    long = [entry.partition("\n\n")[2] for entry in entries if len(entry) > 300]
    # No docstring comes twice; topics of the language reference quote a few sections of others.
    assert len(long) > 100
    assert len(set(long)) > 0.97 * len(long)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    result = subprocess.run(
        [sys.executable, "-m", "lmfast", "demo", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # Models this small are no faster on two threads, and much slower when a core is taken.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return out, result


def test_demo_writes_what_it_says(quick_run):
    out, result = quick_run
    tokenizer = BPETokenizer.load(out / "tokenizer.json")
    for kind in ("recurrent", "decoder"):
        assert load_model(out / kind).vocab_size == tokenizer.vocab_size
    assert (out / "losses.png").read_bytes()[:4] == b"\x89PNG"
    for word in ("perplexity", "train tokens/s", "generate tokens/s", "peak memory", "textbook"):
        assert word in result.stdout
    for bar in ("lmfast recurrent", "textbook recurrent", "lmfast decoder", "textbook decoder"):
        assert f"{bar}: 100%" in result.stderr
    assert result.stdout.count("The following methods return") == 2


def test_demo_figures_agree(quick_run):
    figures = json.loads((quick_run[0] / "figures.json").read_text())
    assert figures["losses_agree"] is True
    results = {(r["model"], r["implementation"]): r for r in figures["results"]}
    assert len(results) == 4
    for (model, implementation), r in results.items():
        other = results[model, "textbook" if implementation == "lmfast" else "lmfast"]
        assert r["parameters"] == other["parameters"]
        assert len(r["losses"]) == figures["settings"]["steps"]
        # The same start, data and updates: rounding is all that differs in 8 steps.
        assert r["losses"] == pytest.approx(other["losses"], abs=1e-4)
        assert r["held_out_loss"] == pytest.approx(other["held_out_loss"], abs=1e-4)
        assert r["train_tokens_per_second"] > 0
        assert r["generate_tokens_per_second"] > 0
    # The end of training is better than the start, for both models.
    assert all(r["losses"][-1] < r["losses"][0] for r in results.values())


def test_demo_models_generate(quick_run, capsys):
    out, _ = quick_run
    assert (
        main(
            [
                "generate",
                "--model",
                str(out / "decoder"),
                "--prompt",
                "Return the",
                "--max-new-tokens",
                "4",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("Return the")


def figures_of(losses, speed, memory):
    return {
        "losses": losses,
        "final_loss": losses[-1],
        "held_out_loss": losses[-1],
        "held_out_perplexity": 2.0,
        "train_tokens_per_second": speed,
        "generate_tokens_per_second": speed,
        "peak_memory_bytes": memory,
    }


def test_table_and_ratios():
    results = {}
    for model in ("recurrent", "decoder"):
        results[model, "lmfast"] = figures_of([3.0, 2.0], 300.0, 1e6)
        results[model, "textbook"] = figures_of([3.0, 2.25], 100.0, 5e6)
    assert ratios(results, "decoder") == {
        "train_tokens_per_second": 3.0,
        "generate_tokens_per_second": 3.0,
        "peak_memory_bytes": 5.0,
    }
    assert largest_difference(results, "decoder") == 0.25
    lines = table(results).splitlines()
    assert len(lines) == 8
    assert lines[4].split()[-3:] == ["3.00x", "3.00x", "1/5.0"]
    assert "0.2500 apart" in lines[7]


def test_demo_input_that_cannot_be_used(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--quick"]
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("absent.txt", "absent.txt: No such file or directory"),
        ("blank.txt", "there is no text in"),
        ("binary.txt", "is not UTF-8 text: byte 0xff at position 0"),
        ("short.txt", "too short"),
    ):
        assert main(["demo", "--data", str(tmp_path / name), *out]) == 1
        err = capsys.readouterr().err
        assert err.startswith("lmfast demo: error: ")
        assert message in err
        assert err.count("\n") == 1
    assert main(["demo", "--steps", "40", *out]) == 1
    assert "--steps 40 has no effect beside --quick" in capsys.readouterr().err
