"""The ways to a GPU's recurrent layers, on the CPU: cuDNN's, where the same PyTorch operators run,
and the persistent kernels', where the CPU's kernels run in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmfast import _extension
from lmfast._dispatch import Op, ops
from lmfast.ops._recurrent_batch import cudnn_forward, gpu_forward, reference
from lmfast.ops._recurrent_cudnn import cudnn_layer, unsupported_by_cudnn
from lmfast.ops._recurrent_reference import Layer, Loop, reference_layer

NAMES = ("elman_rnn", "lstm", "gru")
SAMPLES = [
    (ops()[name], sample)
    for name in NAMES
    for sample in ops()[name].sample_inputs("cpu", torch.float64)
]
SAMPLES = [(op, s) for op, s in SAMPLES if op.check(*s.args, **s.kwargs)[-2] != "gru_textbook"]


def with_gradients(function: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Outputs and gradients of everything that can have one."""
    leaves = [t.detach().requires_grad_() for t in args[:7] if t is not None]
    made = iter(leaves)
    given = [None if t is None else next(made) for t in args[:7]]
    outputs = torch.utils._pytree.tree_leaves(function(*given, *args[7:]))
    outputs = [o for o in outputs if o.requires_grad]
    seeds = [torch.arange(o.numel(), dtype=o.dtype).reshape(o.shape).cos() for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if g is None else g for g in grads)]


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=[f"{o.name}-{s.name}" for o, s in SAMPLES])
def test_values_and_gradients(op: Op, sample: Any) -> None:
    args = op.check(*sample.args, **sample.kwargs)
    found, expected = with_gradients(cudnn_forward, args), with_gradients(reference, args)
    for value, e in zip(found, expected, strict=True):
        # fp64 sums in other orders, over a dozen steps.
        torch.testing.assert_close(value, e, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        plain = torch.utils._pytree.tree_leaves(cudnn_forward(*args))
    for value, e in zip(plain, found):
        torch.testing.assert_close(value, e.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(not _extension.cpu.loaded, reason="needs the CPU's kernels")
@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=[f"{o.name}-{s.name}" for o, s in SAMPLES])
def test_the_way_to_the_persistent_kernels(op: Op, sample: Any) -> None:
    args = op.check(*sample.map(lambda t: t.float() if t.is_floating_point() else t).args,
                    **sample.kwargs)  # fmt: skip
    exact = with_gradients(reference, op.check(*sample.args, **sample.kwargs))
    found = with_gradients(gpu_forward, args)
    scale = 100.0 if sample.name == "large" else 1.0
    for value, e in zip(found, exact, strict=True):
        # fp32 sums of some hundred terms, fed back over a dozen steps.
        torch.testing.assert_close(value.double(), e, rtol=2e-4, atol=2e-5 * scale)


def test_the_persistent_kernels_say_why_not() -> None:
    chosen = ops()["lstm"].implementations["cuda"]
    args = ops()["lstm"].check(torch.ones(1, 1, 1), None, (torch.ones(4, 1), torch.ones(4, 1)))
    if not _extension.cuda.loaded:
        assert chosen.supports(*args) == _extension.cuda.reason


@pytest.mark.parametrize("cell", ["tanh", "relu", "lstm", "gru"])
def test_rows_of_a_packed_sequence_from_their_ends(cell: str) -> None:
    gates = {"lstm": 4, "gru": 3}.get(cell, 1)
    sizes = torch.tensor([4, 4, 2, 1])
    x = torch.randn(11, 3, dtype=torch.float64)
    w_ih, w_hh = torch.randn(gates * 5, 3).double(), torch.randn(gates * 5, 5).double()
    layer = Layer(None, None, w_ih, w_hh, None, torch.randn(gates * 5).double())
    for reverse in (False, True):
        loop = Loop(sizes, 4, cell, reverse)
        found, expected = cudnn_layer(x, layer, loop), reference_layer(x, layer, loop)
        for value, e in zip(found, expected, strict=True):
            torch.testing.assert_close(value, e, rtol=1e-11, atol=1e-12)


def test_the_precision_is_the_ops_and_the_settings_stay() -> None:
    """Whatever the convolutions' is: asked about both, PyTorch raises where they differ."""
    cudnn, seen = torch.backends.cudnn, []
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    x = torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(5, 5, requires_grad=True)
    layer = Layer(None, None, torch.randn(5, 3), weight, None, None)
    try:
        for given in ("tf32", "ieee"):
            cudnn.rnn.fp32_precision, seen = given, []
            y, *_ = cudnn_layer(x, layer, Loop(None, 2, "tanh", False))
            assert y.grad_fn is not None
            inner = y.grad_fn.outputs[0].grad_fn  # type: ignore[attr-defined]
            inner.register_prehook(lambda g, s=seen: s.append(cudnn.rnn.fp32_precision))
            y.sum().backward()
            assert seen == ["ieee"]
            assert cudnn.rnn.fp32_precision == given
            assert (cudnn.conv.fp32_precision, cudnn.deterministic) == before
    finally:
        cudnn.rnn.fp32_precision = "tf32"


def test_gradients_of_gradients_are_the_references() -> None:
    def layer(x: torch.Tensor, w_hh: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        w_ih = torch.linspace(-1, 1, 24, dtype=torch.float64).view(12, 2)
        given = Layer(h, None, w_ih, w_hh, None, None)
        y, last, _ = cudnn_layer(x, given, Loop(None, 2, "gru", True))
        return torch.cat((y, last))

    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 2), (12, 4))]
    inputs.append(torch.randn(2, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_says_why_not() -> None:
    supports = unsupported_by_cudnn
    args = ops()["gru"].check(torch.ones(1, 1, 1), None, (torch.ones(3, 1), torch.ones(3, 1)))
    assert "cuDNN has no gru_textbook cell" in supports(*args[:-2], "gru_textbook", False)
    if not torch.backends.cudnn.is_available():
        assert "cuDNN is not available" in supports(*args)
