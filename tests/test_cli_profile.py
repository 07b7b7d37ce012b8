"""`lmfast profile`: figures that can be counted, tables, files, models of both kinds."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lmfast
from lmfast.cli import main
from lmfast.commands.profile_measure import LayerTimes, launches, measured_ceilings
from lmfast.commands.profile_model import ProfiledModel, profiled_model
from lmfast.commands.profile_work import Work
from lmfast.models import DecoderLanguageModel
from lmfast.training import save_model

CPU = torch.device("cpu")
SIZES = ["--vocab-size", "50", "--emb-dim", "16", "--batch-size", "2"]


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
    arguments = ["--kind", kind, "--mode", mode, *SIZES, "--steps", "1"]
    arguments += ["--heads", "2"] if kind == "decoder" else []
    arguments += ["--new-tokens", "3"] if mode == "generation" else []
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
    # The engine generates in one operator: its layers are those of one pass over the prompt.
    assert calls["embedding"] in ((1,) if mode == "training" else (1, 3))
    if kind == "decoder":
        assert "layers.0.attention" in calls or "layers.0.attn" in calls
    assert json.loads(trace.read_text())["traceEvents"]
    assert "of ceiling" in out
    for counted in ("layers", "operations"):
        assert any(row["gb_per_second"] > 0 for row in content[counted])
        # What runs in the engine is one operator, and is not counted as arithmetic.
        assert mode == "generation" or any(row["gflop_per_second"] > 0 for row in content[counted])


def test_a_saved_model_has_its_own_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed in (["--kind", "decoder"], ["--emb-dim", "128"]):
        assert main(["profile", "--model", str(tmp_path), *typed]) == 1
        assert f"{' '.join(typed)} is of a new model: leave it out" in capsys.readouterr().err


def test_options_without_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, told in (
        (["--device", "meta"], "--device meta cannot be used: its tensors hold no numbers"),
        (["--kind", "recurrent", "--heads", "8"], "--heads 8 is for --kind decoder"),
        (["--new-tokens", "64"], "--new-tokens 64 is for --mode generation"),
    ):
        assert main(["profile", *typed]) == 1
        assert told in capsys.readouterr().err


def test_work_is_counted_by_operator_and_by_layer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2, bias=False))
    x, table = torch.ones(3, 4), torch.ones(100, 6)
    work = Work()
    with torch.no_grad(), work.by_layer(model, 1), work:
        model(x)
        torch.nn.functional.embedding(torch.tensor([5, 7]), table)
        x.view(4, 3)
    assert work.flops["aten::addmm"] + work.flops["aten::mm"] == 2 * 3 * (4 * 8 + 8 * 2)
    assert work.bytes["aten::addmm"] == 4 * (8 + 3 * 4 + 4 * 8 + 3 * 8)
    assert work.bytes["aten::embedding"] == 4 * 2 * 2 * 6
    assert work.bytes["aten::view"] == 0
    assert (work.layer_flops["0"], work.layer_flops["1"]) == (2 * 3 * 4 * 8, 2 * 3 * 8 * 2)
    assert work.layer_bytes["1"] == 4 * (3 * 8 + 8 * 2 + 3 * 2)


def test_arguments_by_name_are_counted() -> None:
    a, out, work = torch.ones(3, 4), torch.ones(3, 3), Work()
    with work:
        torch.mm(a, a.t(), out=out)
        torch.add(a, a, out=a)
    assert work.bytes["aten::mm"] == 4 * (2 * 12 + 9)  # the result is written, not read
    assert work.bytes["aten::add"] == 4 * 2 * 12


def test_convolutions_are_no_experts() -> None:
    model = model_of()
    entries = model.matrix_entries()
    model.module.conv = torch.nn.Conv1d(6, 6, 4, groups=6)
    model.module.expert = torch.nn.Parameter(torch.zeros(4, 2, 8))
    assert replace(model, experts_used=0.25).matrix_entries() == entries + 6 * 4 + 2 * 8


def test_work_of_this_packages_operators(needs_cpu_kernels: None) -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4)
    leaf = q.clone().requires_grad_()
    work = Work()
    with work:
        lmfast.ops.attention(leaf, k, k).sum().backward()  # sees 3, 4 and 5 keys
        with torch.no_grad():
            lmfast.ops.cached_attention(q, k, k, torch.tensor([4]))
    once = 4 * 4 * 2 * (3 + 4 + 5)
    assert work.flops["lmfast::attention"] == once
    assert work.flops["lmfast::attention_backward"] == 2.5 * once
    assert work.flops["lmfast::cached_attention"] == 4 * 4 * 2 * 3 * 4
    assert work.bytes["lmfast::cached_attention"] == 4 * (2 * 4 * 4 + 2 * 2 * 3 * 4)


def test_experts_count_as_often_as_a_token_meets_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = model_of(model=str(tmp_path))
    attention = 2 * 16 * 16 + 2 * 16 * 8
    assert model.matrix_entries() == attention + 16 * 4 + 2 * 3 * 16 * 24 + 60 * 16


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
    for mode in (["training"], ["generation", "--new-tokens", "3"]):
        arguments = ["--steps", "1", "--batch-size", "2", "--mode", *mode]
        assert main(["profile", "--model", str(tmp_path), *arguments]) == 0
        assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_model_that_does_not_continue_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, **sizes)
    ).save_pretrained(tmp_path)
    assert main(["profile", "--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds no causal language model" in error
    assert len(error.strip().splitlines()[-1]) < 400


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


def test_launches_on_a_gpu_are_counted_whoever_starts_them() -> None:
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel")
    names += ("cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "aten::add")
    events = [SimpleNamespace(name=name, cpu_parent=None) for name in names]
    assert launches(events) == (1, 5)


def test_ceilings_are_those_of_a_machine() -> None:
    ceilings = measured_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e15
