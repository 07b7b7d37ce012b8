"""`lmfast profile`: figures that can be counted, tables, files, models of both kinds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmfast.cli import main
from lmfast.commands.profile_measure import LayerTimes, launches, measured_ceilings
from lmfast.commands.profile_model import ProfiledModel, profiled_model
from lmfast.models import DecoderLanguageModel
from lmfast.training import save_model

CPU = torch.device("cpu")
SIZES = ["--vocab-size", "50", "--emb-dim", "16", "--heads", "2", "--batch-size", "2"]


def model_of(**options: Any) -> ProfiledModel:
    names = {"model": None, "kind": "decoder", "vocab_size": 32_011, "emb_dim": 128}
    return profiled_model(argparse.Namespace(**{**names, "heads": 8, "layers": 2, **options}), CPU)


def test_the_work_of_the_reference_decoder(tmp_path: Path) -> None:
    decoder = model_of()
    blocks, attention, output = 2 * 2 * 12 * 128**2, 2 * 29 * 128 * 2, 2 * 128 * 32_011
    assert decoder.flops_per_token(29) == blocks + attention + output
    save_model(tmp_path, DecoderLanguageModel(32_011, 128, 8, 2, 0, tie_weights=True))
    tied = model_of(model=str(tmp_path))
    assert tied.flops_per_token(29) == decoder.flops_per_token(29)
    assert decoder.parameters() - tied.parameters() == 128 * 32_011
    recurrent = model_of(kind="recurrent")
    assert recurrent.flops_per_token(29) == 2 * (4 * 128**2 + 128 * 32_011)
    assert decoder.training_bytes() == 10 * 4 * decoder.parameters()
    flops, moved = decoder.decoding_work(3, 100)
    assert flops == 3 * (blocks + output + 4 * 100 * 128 * 2)
    assert moved == (blocks + output) / 2 * 4 + 3 * 2 * 100 * 128 * 2 * 4


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
@pytest.mark.parametrize("mode", ["training", "generation"])
def test_tables_and_files(
    kind: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    files = ["--json", str(figures), "--trace", str(trace)]
    arguments = ["--kind", kind, "--mode", mode, *SIZES, "--steps", "1", "--new-tokens", "3"]
    assert main(["profile", *arguments, *files]) == 0
    out = capsys.readouterr().out
    for word in ("tokens/s", "GFLOP/s", "GB/s", "peak memory", "layer, forward", "operators"):
        assert word in out
    content = json.loads(figures.read_text())
    parts = {"forward", "backward", "optimiser"} if mode == "training" else {"prompt", "token"}
    assert set(content["milliseconds"]) == parts
    assert min(content["milliseconds"].values()) > 0
    assert all(rate > 1e6 for rate in content["ceilings"].values())
    assert content["operator_calls"] > 10
    calls = {row["layer"]: row["calls"] for row in content["layers"]}
    assert calls["embedding"] == (1 if mode == "training" else 3)
    if kind == "decoder":
        assert "layers.0.attention" in calls or "layers.0.attn" in calls
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = model_of(model=str(tmp_path))
    per_layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
    assert model.matrix_entries() == 2 * per_layer + 60 * 16
    assert (model.attention_width, model.cache_width, model.layers) == (16, 8, 2)
    for mode in ("training", "generation"):
        arguments = ["--mode", mode, "--steps", "1", "--new-tokens", "3", "--batch-size", "2"]
        assert main(["profile", "--model", str(tmp_path), *arguments]) == 0
        assert "LlamaForCausalLM" in capsys.readouterr().out


def test_layers_are_timed_in_order_and_hooks_removed() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    module = torch.nn.Sequential(inner, torch.nn.Linear(3, 2))
    times = LayerTimes(2, CPU)
    with times.recording(module):
        module(torch.ones(1, 3))
        module(torch.ones(1, 3))
    module(torch.ones(1, 3))
    assert [(n, c) for n, c, _ in times.rows()] == [("0", 2), ("0.0", 2), ("0.1", 2), ("1", 2)]
    seconds = {n: s for n, _, s in times.rows()}
    assert seconds["0"] >= seconds["0.0"]


def test_launches_count_top_operators() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        x = torch.ones(4, 4)  # one
        x = torch.nn.functional.linear(x, x)  # one, with others inside
        x.sum()  # one
    assert launches(recorded.events()) == (3, 0)


def test_ceilings_are_those_of_a_machine() -> None:
    ceilings = measured_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e15
