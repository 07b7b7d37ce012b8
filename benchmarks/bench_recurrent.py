"""nn.RNN, LSTM and GRU against torch.nn's, the textbook's loop, torch.compile of its step, and
onnxruntime without gradients.

Shapes: the small reference model, a medium one, one long sequence, one step of a stream. Large
batches are bound by arithmetic that all do, single sequences by reading the weights and by
dispatch. PackedSequence rows hold lengths from 1 to T; "padded" is our time for all T steps, to be
multiplied by the share of steps that are real (0.51).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lmfast
from lmfast.ops._recurrent_reference import cell_step

MODES = pytest.mark.parametrize("mode", ["RNN", "LSTM", "GRU"])
# (B, T, H, layers)
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (128, 30, 128, 2),
        (64, 35, 512, 2),
        (32, 128, 1024, 1),
        (1, 256, 512, 1),
        (1, 256, 128, 1),
        (1, 256, 128, 2),
    ],
    ids=lambda s: "x".join(map(str, s)),
)


def layers(mode: str, hidden: int, count: int, **options: bool) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's with the same weights."""
    theirs = getattr(nn, mode)(hidden, hidden, count, batch_first=True, **options)
    ours = getattr(lmfast.nn, mode)(hidden, hidden, count, batch_first=True, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def train(layer: Callable[..., tuple[Tensor, object]], x: Tensor) -> None:
    layer(x)[0].sum().backward()


NAMES = {"RNN": "tanh", "LSTM": "lstm", "GRU": "gru"}
Run = Callable[[Tensor], tuple[Tensor, None]]


def textbook(mode: str, layer: nn.Module, compiled: bool = False) -> Run:
    """The stack as a loop over time and layers, with the weights of ``layer``."""

    def one(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh = weights
        return cell_step(NAMES[mode], F.linear(x, w_ih, b_ih), h, c, w_hh, b_hh)

    step = torch.compile(one, dynamic=False) if compiled else one

    def run(x: Tensor) -> tuple[Tensor, None]:
        states = [(x.new_zeros(len(x), layer.hidden_size),) * 2 for _ in range(layer.num_layers)]
        outputs = []
        for now in x.unbind(1):
            for i, weights in enumerate(layer.all_weights):
                states[i] = step(now, *states[i], *weights)
                now = states[i][0]
            outputs.append(now)
        return torch.stack(outputs, 1), None

    return run


def textbooks(mode: str, layer: nn.Module, shape: tuple[int, ...]) -> dict[str, Run]:
    """The loop, and where compiling pays least or most, the loop over a compiled step."""
    found = {"textbook": textbook(mode, layer)}
    if shape[:3] in ((128, 30, 128), (1, 256, 512)):
        found["compile"] = textbook(mode, layer, compiled=True)
    return found


def onnx_runner(layer: nn.Module, x: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """onnxruntime on the layer written as ONNX, with as many threads as torch; nothing without."""
    try:
        import onnxruntime
    except ImportError:
        return {}
    lmfast.nn.export_onnx(layer, folder / "layer.onnx", initial_state=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin on after a run, on the cores of whoever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        str(folder / "layer.onnx"), options, providers=["CPUExecutionProvider"]
    )
    given = {"x": x.numpy()}
    return {"onnxruntime": lambda: session.run(None, given)}


@SHAPES
@MODES
def bench_layer_with_gradients(
    compare: Callable[..., None], mode: str, shape: tuple[int, int, int, int]
) -> None:
    batch, steps, hidden, count = shape
    x = torch.randn(batch, steps, hidden, requires_grad=True)
    ours, theirs = layers(mode, hidden, count)
    loops = textbooks(mode, theirs, shape)
    peers = {"torch.nn": lambda: train(theirs, x)}
    peers |= {name: partial(train, loop, x) for name, loop in loops.items()}
    compare(
        f"{mode} fwd+bwd {batch}x{steps}x{hidden} layers {count}",
        lambda: train(ours, x),
        peers,
        rounds=9,
    )


@pytest.mark.parametrize(
    "shape", [(128, 30, 128, 2), (64, 35, 512, 2), (32, 128, 1024, 1)], ids=["128", "512", "1024"]
)
@MODES
def bench_bf16_with_gradients(
    compare: Callable[..., None], mode: str, shape: tuple[int, int, int, int]
) -> None:
    """bf16 layers, and fp32 ones at matmul precision "medium", against torch.nn in fp32."""
    if not lmfast._extension.has_bf16_tiles():
        pytest.skip("neither AMX nor AVX512-BF16 here")
    batch, steps, hidden, count = shape
    x = torch.randn(batch, steps, hidden, requires_grad=True)
    narrow = x.detach().bfloat16().requires_grad_()
    ours, theirs = layers(mode, hidden, count)
    ours_narrow, theirs_narrow = (m.bfloat16() for m in layers(mode, hidden, count))

    def medium() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            train(ours, x)
        finally:
            torch.set_float32_matmul_precision(before)

    compare(
        f"{mode} fwd+bwd bf16 {batch}x{steps}x{hidden} layers {count}",
        lambda: train(ours_narrow, narrow),
        {
            "torch.nn": lambda: train(theirs, x),
            "torch.nn bf16": lambda: train(theirs_narrow, narrow),
            "ours, medium": medium,
        },
        rounds=5,
    )


@SHAPES
@MODES
def bench_layer(
    compare: Callable[..., None], mode: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    batch, steps, hidden, count = shape
    x = torch.randn(batch, steps, hidden)
    ours, theirs = layers(mode, hidden, count)
    loops = textbooks(mode, theirs, shape)
    with torch.no_grad():
        compare(
            f"{mode} fwd {batch}x{steps}x{hidden} layers {count}",
            lambda: ours(x),
            {
                "torch.nn": lambda: theirs(x),
                **{name: partial(loop, x) for name, loop in loops.items()},
                **onnx_runner(ours, x, tmp_path),
            },
            rounds=9,
        )


@pytest.mark.parametrize("count", [1, 2], ids=["1 layer", "2 layers"])
@MODES
def bench_one_step_of_a_stream(compare: Callable[..., None], mode: str, count: int) -> None:
    """Twenty calls of one step each: a stream's steps follow one another, and a call alone would be
    measured with the instructions of whatever ran before it in the caches."""
    x = torch.randn(1, 1, 128)
    ours, theirs = layers(mode, 128, count)

    def stream(layer: nn.Module) -> None:
        state = None
        for _ in range(20):
            state = layer(x, state)[1]

    with torch.no_grad():
        compare(
            f"{mode} 20 single steps, H 128 layers {count}",
            lambda: stream(ours),
            {"torch.nn": lambda: stream(theirs)},
            rounds=51,
        )


def packed(batch: int, steps: int, width: int) -> PackedSequence:
    lengths = torch.linspace(1, steps, batch).long()
    return pack_padded_sequence(
        torch.randn(batch, steps, width), lengths, batch_first=True, enforce_sorted=False
    )


@MODES
def bench_packed_with_gradients(compare: Callable[..., None], mode: str) -> None:
    x = packed(64, 35, 512)
    full = torch.randn(64, 35, 512)
    ours, theirs = layers(mode, 512, 1)

    def run(layer: nn.Module) -> None:
        layer(x)[0].data.sum().backward()

    compare(
        f"{mode} fwd+bwd packed 64x(1..35)x512",
        lambda: run(ours),
        {"torch.nn": lambda: run(theirs), "ours, padded": lambda: train(ours, full)},
        rounds=9,
    )


@pytest.mark.parametrize(
    "shape", [(1, 256, 128), (1, 256, 512), (32, 64, 256)], ids=["1x128", "1x512", "32x256"]
)
@MODES
def bench_both_ways_with_gradients(
    compare: Callable[..., None], mode: str, shape: tuple[int, int, int]
) -> None:
    batch, steps, hidden = shape
    x = torch.randn(batch, steps, hidden, requires_grad=True)
    ours, theirs = layers(mode, hidden, 1, bidirectional=True)
    one, _ = layers(mode, hidden, 1)
    compare(
        f"{mode} fwd+bwd both ways {batch}x{steps}x{hidden}",
        lambda: train(ours, x),
        {"torch.nn": lambda: train(theirs, x), "ours, one way": lambda: train(one, x)},
        rounds=9,
    )


@pytest.mark.parametrize("hidden", [128, 256])
def bench_projections_with_gradients(compare: Callable[..., None], hidden: int) -> None:
    x = torch.randn(1, 256, hidden, requires_grad=True)
    theirs = nn.LSTM(hidden, hidden, batch_first=True, proj_size=hidden // 4)
    ours = lmfast.nn.LSTM(hidden, hidden, batch_first=True, proj_size=hidden // 4)
    ours.load_state_dict(theirs.state_dict())
    compare(
        f"LSTM fwd+bwd projected to a quarter 1x256x{hidden}",
        lambda: train(ours, x),
        {"torch.nn": lambda: train(theirs, x)},
        rounds=9,
    )
