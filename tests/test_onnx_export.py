"""Layers written as ONNX give in onnxruntime what they give here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfast
from lmfast.nn import export_onnx, length_mask

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Sums in another order and another tanh, over six steps and two layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(t) for t in session.run(None, {k: v.numpy() for k, v in inputs.items()})
    ]


def flat(value: Any) -> list[Tensor]:
    return [t for v in value for t in flat(v)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "TextbookGRU"])
@torch.no_grad()
def test_every_form_of_every_layer(kind: str, tmp_path: Path) -> None:
    for layers, both, batch_first, bias in itertools.product((1, 2), *[(False, True)] * 3):
        layer = getattr(lmfast.nn, kind)(
            5, 7, layers, bias=bias, batch_first=batch_first, bidirectional=both
        )
        x = torch.randn(3, 6, 5) if batch_first else torch.randn(6, 3, 5)
        count = 2 if kind == "LSTM" else 1
        states = [torch.randn(layers * (1 + both), 3, 7) for _ in range(count)]
        given = tuple(states) if kind == "LSTM" else states[0]
        export_onnx(layer, tmp_path / "m.onnx")
        found = run(tmp_path / "m.onnx", dict(zip(("x", "h0", "c0"), (x, *states))))
        for f, e in zip(found, flat(layer(x, given)), strict=True):
            torch.testing.assert_close(f, e, **CLOSE)
        export_onnx(layer, tmp_path / "m.onnx", initial_state=False)
        for f, e in zip(run(tmp_path / "m.onnx", {"x": x}), flat(layer(x)), strict=True):
            torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "TextbookGRU"])
@torch.no_grad()
def test_lengths_are_a_packed_sequence(kind: str, tmp_path: Path) -> None:
    layer = getattr(lmfast.nn, kind)(5, 7, 2, batch_first=True, bidirectional=True)
    x, lengths = torch.randn(4, 6, 5), torch.tensor([6, 2, 5, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, final = layer(packed)
    y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    export_onnx(layer, tmp_path / "m.onnx", sequence_lens=True, initial_state=False)
    found = run(tmp_path / "m.onnx", {"x": x, "sequence_lens": lengths.int()})
    assert (found[0][~length_mask(lengths, 6)] == 0).all()
    for f, e in zip(found, [y, *flat(final)], strict=True):
        torch.testing.assert_close(f, e, **CLOSE)


@torch.no_grad()
def test_relu_elman_and_torchs_own_layers(tmp_path: Path) -> None:
    x, path = torch.randn(3, 6, 5), tmp_path / "m.onnx"
    relu = lmfast.nn.RNN(5, 7, nonlinearity="relu", batch_first=True)
    for layer, expected in (
        (relu, relu(x)[0]),
        (theirs := nn.GRU(5, 7, batch_first=True), theirs(x)[0]),
        (elman := lmfast.nn.ElmanRNN(5, 2), elman(x)),
    ):
        export_onnx(layer, path, initial_state=False)
        torch.testing.assert_close(run(path, {"x": x})[0], expected, **CLOSE)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "RNN" in kinds


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="module must be an RNN"):
        export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="proj_size must be 0"):
        export_onnx(nn.LSTM(3, 4, proj_size=2), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="must be in float32"):
        export_onnx(nn.LSTM(3, 4).double(), tmp_path / "m.onnx")
