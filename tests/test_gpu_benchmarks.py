"""The GPU's benchmark without a GPU: every case with fake tensors, and the plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks import gpu, gpu_case, gpu_layer_cases
from benchmarks.gpu_case import Case, run_once
from benchmarks.gpu_cases import CASES
from benchmarks.gpu_generation import decoder, generation_rows
from lmfast.models import RecurrentLanguageModel

# They exist on a GPU only, have no function for shapes alone, or start the compiler.
LEFT_OUT = ("compile", "F.linear_cross_entropy", "cudnn", "flash", "efficient")
LEFT_OUT += ("flash-attn", "liger", "cuda, no clusters")


class OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU that are asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("cases", CASES, ids=lambda c: c.__name__)
def test_every_case_runs(
    cases: Callable[[], Iterator[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments, shapes and gradients fit, by the reference and eager PyTorch."""
    monkeypatch.setattr(gpu_case, "GPU_BACKENDS", ("torch",))
    monkeypatch.setattr(gpu_layer_cases, "STEPS", 3)  # the reference walks them one by one
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # no look at values
    with FakeTensorMode(allow_non_fake_inputs=True), OnCpu():
        names = []
        for case in cases():
            names.append(case.name)
            assert case.moved > 0
            for name, variant in case.variants.items():
                if name in LEFT_OUT:
                    continue
                run_once(case, variant, case.make())
        assert len(set(names)) == len(names)


def test_generation_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    models = {
        "tiny": lambda: decoder(50, 16, 2, 1, 1, True),
        "untied": lambda: decoder(50, 16, 2, 1, 2, False),
        "recurrent": lambda: RecurrentLanguageModel(50, 16, 2, 0, cell="lstm"),
    }
    rows = list(generation_rows(1e9, models=models, new=3, device="cpu"))
    assert [r["case"] for r in rows] == [f"generate {name}" for name in models]
    for row in rows:
        assert set(row["variants"]) == {"graph", "loop"}
        assert row["bytes"] > 2 * 50 * 16
        gpu.show(row)
    assert capsys.readouterr().out.count("tokens/s") == 6


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    variants = {
        "triton": {"us": 3.0, "share_of_copy": 0.9},
        "eager": {"us": 4.0, "share_of_copy": 0.6, "share_of_matmul": 0.5},
        "compile": {"error": "RuntimeError"},
    }
    rows = [{"case": "one", "variants": variants}, {"case": "two", "variants": {}}]
    report = json.loads(json.dumps({"device": "a GPU", "torch": "2", "rows": rows}))
    gpu.plot(report, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 5000


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no GPU" in capsys.readouterr().err
