"""What is measured on a GPU and kept: the choice of a backend, and of a kernel's configuration."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lmfast
from benchmarks import gpu
from benchmarks.gpu_case import Case
from lmfast import _dispatch, _measured
from lmfast.triton import _tuning

CONFIGS = ({"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 3})
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _unknown_devices() -> Iterator[None]:
    _measured.device_kind.cache_clear()
    yield
    _measured.device_kind.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, int]]:
    """A GPU on which a launch takes as long as the last configuration says; the launches."""
    launches: list[dict[str, int]] = []
    monkeypatch.setenv("LMFAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LMFAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T-1 (x)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "_chosen", {})

    def seconds(run: Any) -> float:
        run()
        return abs(launches[-1]["BLOCK"] - 2) + 1.0

    monkeypatch.setattr(_tuning, "seconds", seconds)
    return launches


def pick(launches: list[dict[str, int]], *key: Any) -> dict[str, int]:
    return _tuning.pick("kernel", key, CONFIGS, DEVICE, launches.append)


def test_the_fastest_configuration_is_kept(device: list[dict[str, int]], tmp_path: Path) -> None:
    assert pick(device, 1) == {"BLOCK": 2}
    assert pick(device, 1) == {"BLOCK": 2}
    assert device == list(CONFIGS)  # measured once
    _tuning._chosen.clear()  # another process
    assert pick(device, 1) == {"BLOCK": 2}
    assert len(device) == 3
    assert pick(device, 2) == {"BLOCK": 2}
    assert len(device) == 6
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == "triton-NVIDIA-T-1-x.json"
    assert json.loads(file.read_text()) == {"kernel 1 of 3": 1, "kernel 2 of 3": 1}


def test_no_measurement_in_a_graph_or_where_it_is_off(
    device: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick(device, 1) == CONFIGS[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("LMFAST_AUTOTUNE", "0")
    assert pick(device, 1) == CONFIGS[0]
    assert _tuning.pick("kernel", (), CONFIGS, torch.device("cpu"), device.append) == CONFIGS[0]
    assert device == []
    monkeypatch.delenv("LMFAST_AUTOTUNE")
    assert pick(device, 1) == CONFIGS[1]  # nothing was kept before


@pytest.mark.parametrize("content", ["", "[1]", '{"kernel 1 of 3": "x"}', '{"kernel 1 of 3": -1}'])
def test_a_damaged_file_is_measured_again(
    device: list[dict[str, int]], tmp_path: Path, content: str
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/triton-NVIDIA-T-1-x.json").write_text(content)
    assert pick(device, 1) == {"BLOCK": 2}


def test_a_folder_that_cannot_be_written(
    device: list[dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMFAST_CACHE_DIR", str(tmp_path / "file"))
    assert pick(device, 1) == {"BLOCK": 2}


def test_every_set_of_configurations_is_small_and_its_first_is_the_default() -> None:
    pytest.importorskip("triton")
    from lmfast.triton import linear, quantised_linear

    sets = (linear.CONFIGS, quantised_linear.VECTOR_CONFIGS, quantised_linear.MATRIX_CONFIGS)
    for configs in sets:
        assert 1 < len(configs) <= 4
        assert len({tuple(sorted(c.items())) for c in configs}) == len(configs)


class OnGpu(torch.Tensor):
    """Says it is on a GPU."""

    is_cuda = True
    device = DEVICE


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).as_subclass(OnGpu)


def test_classes_round_sizes_up() -> None:
    args = (torch.zeros(5, 33), torch.zeros(64, 33), None, 1)
    assert _measured.class_of("linear", args) == "linear float32 8x64 64x64"
    leaf = torch.zeros(3, requires_grad=True)
    assert _measured.class_of("rms_norm", (leaf,)) == "rms_norm float32 4 with gradients"


def test_what_was_measured_decides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T-1 (x)")
    x, weight = on_gpu(16, 4), on_gpu(8, 4)
    assert lmfast.explain("linear", x, weight) == "torch"
    assert "cuBLAS's product" in capsys.readouterr().out
    table = {"NVIDIA-T-1-x": {"linear float32 16x4 8x4": {"triton": 3.0, "torch": 4.5}}}
    monkeypatch.setattr(_measured, "TABLE", table)
    op = _dispatch.ops()["linear"]
    args = op.check(x, weight)
    wanted = ("triton", "measured on NVIDIA-T-1-x: triton 3.0 us, torch 4.5 us")
    assert _dispatch._preferred(op, args) == wanted
    other = op.check(on_gpu(64, 4), weight)
    assert _dispatch._preferred(op, other) == ("torch", "cuBLAS's product is faster")
    table["NVIDIA-T-1-x"]["linear float32 16x4 8x4"]["torch"] = 2.0
    assert lmfast.explain("linear", x, weight) == "torch"
    assert "measured on NVIDIA-T-1-x: torch 2.0 us" in capsys.readouterr().out


def test_many_rows_take_the_library_s_product_of_the_widened_matrix() -> None:
    prefer = _dispatch.ops()["quantised_linear"].prefer
    assert prefer is not None
    assert prefer(on_gpu(4, 256, 8)) is None
    assert prefer(on_gpu(5, 256, 8)) == (
        "torch",
        "1280 rows: above 1024 cuBLAS's product is faster",
    )
    assert prefer(torch.zeros(2000, 8)) is None


def test_its_gradient_widens_the_matrix_anew() -> None:
    """What runs on a GPU, here on the CPU: no matrix is kept from forward to backward."""
    module = importlib.import_module("lmfast.ops.quantised_linear")

    codes, scales = lmfast.ops.quantise_weight(torch.randn(7, 12))
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    dy, kept = torch.randn(5, 7, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = module.apply(module._QuantisedLinear, x, codes, scales, bias, "torch")
    assert all(t.dtype == torch.int8 or t.numel() < 84 for t in kept)
    found = torch.autograd.grad(y, (x, bias), dy)
    expected = module._reference(x, codes, scales, bias)
    torch.testing.assert_close(y, expected)
    for a, b in zip(found, torch.autograd.grad(expected, (x, bias), dy), strict=True):
        torch.testing.assert_close(a, b)


def test_the_benchmark_enters_what_it_measured() -> None:
    variants = {"torch": lambda x, w: lmfast.ops.linear(x, w, backend="torch"), "eager": None}
    case = Case("linear", lambda: (torch.zeros(3, 4), torch.zeros(5, 4)), variants, 1)
    times = {"torch": {"us": 2.004}, "triton": {"us": 1.0}, "eager": {"us": 0.1}}
    table: _measured.Table = {}
    gpu.keep_choice(table, "T", case, {"variants": times})
    assert table == {"T": {"linear float32 4x4 8x4": {"torch": 2.0, "triton": 1.0}}}
    gpu.keep_choice(table, "T", case, {"variants": {"torch": {"us": 1.0}, "cuda": {"error": ""}}})
    assert table["T"]["linear float32 4x4 8x4"] == {"torch": 2.0, "triton": 1.0}
    assert _measured.asked is None


def test_the_kept_choices_name_ops_and_backends() -> None:
    for classes in json.loads(_measured.PATH.read_text()).values():
        for name, times in classes.items():
            implementations = _dispatch.ops()[name.split()[0]].implementations
            assert set(times) <= set(implementations)
            assert all(us > 0 for us in times.values())
