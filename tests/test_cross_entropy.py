"""cross_entropy on given logits: values, gradients, in place."""

import math

import pytest
import torch
import torch.nn.functional as F

from lmfast import _extension
from lmfast.ops import cross_entropy
from lmfast.ops.cross_entropy import OP
from lmfast.testing import FP64_TOLERANCE, unit_in_last_place

pytestmark = pytest.mark.skipif(not _extension.cpu.loaded, reason="_cpu is not built")


@pytest.fixture(params=_extension.available_cpu_isas() or ("none",))
def isa(request):
    before = _extension.cpu_isa()
    _extension.set_cpu_isa(request.param)
    yield request.param
    _extension.set_cpu_isa(before)


def run(function, sample):
    logits = sample.args[0].detach().clone().requires_grad_()
    loss = function(logits, *sample.args[1:], **sample.kwargs)
    weights = torch.linspace(0.5, -1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * weights).sum().backward()
    return loss.detach(), logits.grad


def reference(*args, **kwargs):
    return OP.reference(*OP.check(*args, **kwargs))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_far_from_zero_keep_their_differences(isa, backend, smoothing):
    """At 10^7 fp32 numbers are one apart, and so are whole logits exact."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(-4, 5, (3, 37), generator=generator)
    logits = (1e7 + offsets).float().requires_grad_()
    targets = torch.tensor([3, 36, 0])
    loss = cross_entropy(logits, targets, label_smoothing=smoothing, backend=backend)
    (found,) = torch.autograd.grad(loss, logits)
    exact_logits = offsets.double().requires_grad_()
    exact = F.cross_entropy(exact_logits, targets, label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(exact, exact_logits)
    # Sums of 37 fp32 numbers.
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_samples(isa, dtype):
    for sample in OP.sample_inputs("cpu", dtype):
        value = run(lambda *a, **k: cross_entropy(*a, **k, backend="cpu"), sample)
        plain, exact = run(reference, sample), run(reference, sample.to_fp64())
        for v, p, x in zip(value, plain, exact):
            assert v.shape == p.shape
            assert v.dtype == p.dtype
            if x.numel() == 0:
                continue
            error, plain_error = (v - x).abs().max(), (p - x).abs().max()
            # Two units: of sums over a few elements, luck decides which rounds less.
            allowed = 1.5 * plain_error + 2 * unit_in_last_place(x, dtype).max()
            if dtype == torch.float64:
                allowed = FP64_TOLERANCE * x.abs().max().clamp_min(1)
            assert error <= allowed, f"{sample.name}: {error:.3e}, PyTorch {plain_error:.3e}"


def test_in_place_saves_the_memory_and_gives_the_same():
    torch.manual_seed(0)
    hidden = torch.randn(7, 8, requires_grad=True)
    weight = torch.randn(8, 19)
    targets = torch.randint(19, (7,))
    results = []
    for inplace in (False, True):
        hidden.grad = None
        logits = hidden @ weight
        before = logits.detach().clone()
        loss = cross_entropy(logits, targets, inplace=inplace, label_smoothing=0.1)
        assert torch.equal(before, logits.detach()) is not inplace
        (3 * loss).backward()
        results.append((loss.detach(), hidden.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])  # in place is rounded once more


def test_in_place_does_not_touch_what_must_stay():
    logits, targets = torch.randn(3, 5), torch.tensor([1, 2, 3])
    before = logits.clone()
    cross_entropy(logits, targets, inplace=True)
    assert torch.equal(logits, before)  # nothing needs a gradient
    with pytest.raises(ValueError, match="leaf"):
        cross_entropy(logits.requires_grad_(), targets, inplace=True)
    with pytest.raises(ValueError, match="inplace must be False"):
        cross_entropy(logits * 2, targets, reduction="none", inplace=True)
    saved = torch.tanh(logits)  # its backward needs the values that are overwritten
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(saved, targets, inplace=True).backward()
    loss = cross_entropy(logits * 2, targets, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 6, -100, 0])

    def function(x):
        return cross_entropy(
            x, targets, reduction=reduction, label_smoothing=0.1, z_loss=0.02, backend="cpu"
        )

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace):
    torch.manual_seed(0)
    hidden, targets = torch.randn(5, 8, requires_grad=True), torch.randint(19, (5,))
    weight = torch.randn(8, 19)
    compiled = torch.compile(
        lambda h: cross_entropy(h @ weight, targets, inplace=inplace),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(hidden).backward()
    ours = hidden.grad
    hidden.grad = None
    F.cross_entropy(hidden @ weight, targets).backward()
    torch.testing.assert_close(ours, hidden.grad)


def test_opcheck():
    logits, targets = torch.randn(4, 7), torch.tensor([1, 6, -100, 0])
    ops = torch.ops.lmfast
    torch.library.opcheck(
        ops.cross_entropy.default, (logits, targets, None, -100, 1, 0.0, 0.0, True)
    )
    torch.library.opcheck(ops.cross_entropy_.default, (logits, targets, None, -100, 1, 0.0, 0.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row", [[-math.inf, 0.0, 1.0], [-math.inf, -math.inf, 1.0]])
def test_classes_masked_out_by_infinite_logits(isa, row, smoothing):
    """As PyTorch: no part in the sum; an infinite loss only for a target among them."""
    for target in (2, 0):
        for backend in ("cpu", "torch"):
            x = torch.tensor([row], dtype=torch.float64, requires_grad=True)
            y = x.detach().clone().requires_grad_()
            targets = torch.tensor([target])
            loss = cross_entropy(x, targets, label_smoothing=smoothing, backend=backend)
            expected = F.cross_entropy(y, targets, label_smoothing=smoothing)
            torch.testing.assert_close(loss, expected, rtol=FP64_TOLERANCE, atol=FP64_TOLERANCE)
            loss.backward()
            expected.backward()
            torch.testing.assert_close(x.grad, y.grad, rtol=FP64_TOLERANCE, atol=FP64_TOLERANCE)


def test_errors():
    with pytest.raises(ValueError, match="at least one class"):
        cross_entropy(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="leading dimensions"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 3\)"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3]))
