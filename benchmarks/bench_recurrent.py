"""nn.RNN, LSTM and GRU against torch.nn's, the textbook's loop and torch.compile of it.

Shapes: the small reference model, a medium one, one long sequence, one step of a stream. Large
batches are bound by arithmetic that both do, single sequences by reading the weights and by
dispatch. PackedSequence rows hold lengths from 1 to T.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lmfast

MODES = pytest.mark.parametrize("mode", ["RNN", "LSTM", "GRU"])
# (B, T, H, layers)
SHAPES = pytest.mark.parametrize(
    "shape",
    [(128, 30, 128, 2), (64, 35, 512, 2), (32, 128, 1024, 1), (1, 256, 512, 1), (1, 256, 128, 1)],
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


def textbook(layer: nn.Module) -> Callable[[Tensor], tuple[Tensor, None]]:
    """An Elman stack as a loop over time, with the weights of ``layer``."""

    def run(x: Tensor) -> tuple[Tensor, None]:
        states = [x.new_zeros(x.shape[0], layer.hidden_size) for _ in range(layer.num_layers)]
        outputs = []
        for step in x.unbind(1):
            for i, (w_ih, w_hh, b_ih, b_hh) in enumerate(layer.all_weights):
                states[i] = torch.tanh(step @ w_ih.t() + b_ih + states[i] @ w_hh.t() + b_hh)
                step = states[i]
            outputs.append(step)
        return torch.stack(outputs, 1), None

    return run


@SHAPES
@MODES
def bench_layer_with_gradients(
    compare: Callable[..., None], mode: str, shape: tuple[int, int, int, int]
) -> None:
    batch, steps, hidden, count = shape
    x = torch.randn(batch, steps, hidden, requires_grad=True)
    ours, theirs = layers(mode, hidden, count)
    peers = {"torch.nn": lambda: train(theirs, x)}
    if mode == "RNN":
        loop = textbook(theirs)
        peers["textbook"] = lambda: train(loop, x)
        if steps <= 35:  # unrolled by torch.compile: minutes for more steps
            compiled = torch.compile(loop)
            peers["compile"] = lambda: train(compiled, x)
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
        rounds=7,
    )


@SHAPES
@MODES
def bench_layer(compare: Callable[..., None], mode: str, shape: tuple[int, int, int, int]) -> None:
    batch, steps, hidden, count = shape
    x = torch.randn(batch, steps, hidden)
    ours, theirs = layers(mode, hidden, count)
    with torch.no_grad():
        compare(
            f"{mode} fwd {batch}x{steps}x{hidden} layers {count}",
            lambda: ours(x),
            {"torch.nn": lambda: theirs(x)},
            rounds=9,
        )


@pytest.mark.parametrize("count", [1, 2], ids=["1 layer", "2 layers"])
@MODES
def bench_one_step_of_a_stream(compare: Callable[..., None], mode: str, count: int) -> None:
    x = torch.randn(1, 1, 128)
    ours, theirs = layers(mode, 128, count)
    with torch.no_grad():
        state = theirs(x)[1]
        compare(
            f"{mode} one step, H 128 layers {count}",
            lambda: ours(x, state),
            {"torch.nn": lambda: theirs(x, state)},
            rounds=201,
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


@pytest.mark.parametrize("shape", [(1, 256, 512), (32, 64, 256)], ids=["1x512", "32x256"])
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
