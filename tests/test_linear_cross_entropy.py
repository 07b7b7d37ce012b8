"""linear_cross_entropy and selected_log_probs: values, gradients, settings, memory, modes."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from lmfast import _extension
from lmfast._dispatch import BackendError
from lmfast.ops import linear_cross_entropy
from lmfast.ops.linear_cross_entropy import OP
from lmfast.testing import FP64_TOLERANCE, Sample, relative_error, unit_in_last_place

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_cpu = pytest.mark.skipif(not _extension.cpu.loaded, reason="_cpu is not built")


@pytest.fixture(params=_extension.available_cpu_isas() or ("none",))
def isa(request):
    if request.param == "none":
        pytest.skip("_cpu is not built")
    before = _extension.cpu_isa()
    _extension.set_cpu_isa(request.param)
    yield request.param
    _extension.set_cpu_isa(before)


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def run(function, sample):
    """The loss and the gradient of every floating-point argument, for uneven incoming ones."""
    leaves = []

    def leaf(t):
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().clone(memory_format=torch.preserve_format).requires_grad_())
        return leaves[-1]

    sample = sample.map(leaf)
    loss = function(*sample.args, **sample.kwargs)
    weights = torch.linspace(0.5, -1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * weights).sum().backward()
    return [loss.detach(), *(t.grad for t in leaves)]


def reference(*args, **kwargs):
    return OP.reference(*OP.check(*args, **kwargs))


def assert_rule(value, plain, exact, what):
    """1.5 times PyTorch's error, plus two units in the last place of the largest element.

    Samples are small: which of two sums rounds more luckily decides, hence the second unit.
    ``test_several_blocks`` holds the rule itself, over tensors large enough for it.
    """
    assert value.shape == plain.shape, what
    assert value.dtype == plain.dtype, what
    if exact.numel() == 0:
        return
    if value.dtype == torch.float64:
        assert (value - exact).abs().max() <= FP64_TOLERANCE, what
        return
    error, plain_error = (value - exact).abs().max(), (plain - exact).abs().max()
    allowed = 1.5 * plain_error + 2 * unit_in_last_place(exact, value.dtype).max()
    assert error <= allowed, f"{what}: {error:.3e}, PyTorch {plain_error:.3e}"


def check_sample(sample, backend):
    value = run(lambda *a, **k: linear_cross_entropy(*a, **k, backend=backend), sample)
    plain, exact = run(reference, sample), run(reference, sample.to_fp64())
    for i, (v, p, x) in enumerate(zip(value, plain, exact, strict=True)):
        assert_rule(v, p, x, f"{sample.name} result {i}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_on_cpu(isa, dtype):
    for sample in OP.sample_inputs("cpu", dtype):
        check_sample(sample, "cpu")


def test_softcap_with_smoothing_is_left_to_pytorch():
    sample = Sample(
        "both",
        (torch.randn(9, 8), torch.randn(19, 8), torch.arange(9)),
        {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.01},
    )
    check_sample(sample, "torch")
    with pytest.raises(BackendError, match="torch backend only"):
        linear_cross_entropy(*sample.args, **sample.kwargs, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_samples_in_chunks(dtype, monkeypatch):
    module = sys.modules["lmfast.ops._linear_cross_entropy_chunked"]
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 100)
    for sample in OP.sample_inputs("cpu", dtype):
        check_sample(sample, "torch")


@needs_cpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.01}, {"label_smoothing": 0.1}])
def test_several_blocks(isa, transposed, settings):
    """More tokens than a block and classes than a chunk: whole-tensor errors, every part."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(301, 65), torch.randn(1003, 65) * 0.3, torch.randn(1003)
    targets = torch.randint(1003, (301,))
    targets[::7] = -100

    def grads(dtype, function):
        h, w, b = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight, bias))
        loss = function(h, w.t().contiguous().t() if transposed else w, b)
        loss.backward()
        return [loss.detach(), h.grad, w.grad, b.grad]

    ours = grads(
        torch.float32,
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, backend="cpu", **settings),
    )

    def plain(h, w, b):
        return reference(h, w, targets, bias=b, **settings)

    exact, torchs = grads(torch.float64, plain), grads(torch.float32, plain)
    for name, a, p, x in zip(("loss", "dhidden", "dweight", "dbias"), ours, torchs, exact):
        assert relative_error(a, x) <= 1.5 * relative_error(p, x) + 6e-8, name


@needs_cpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 4.0}, {"label_smoothing": 0.1, "z_loss": 0.01}]
)
def test_bf16_products(isa, medium, dtype, transposed, settings):
    """ "medium" and bf16 inputs: at most 1.5 times the error of PyTorch's bf16 products.

    More tokens than a block has, more classes than a chunk, and both in part.
    """
    torch.manual_seed(0)
    hidden, weight = torch.randn(301, 65).to(dtype), (torch.randn(1003, 65) * 0.2).to(dtype)
    bias, targets = torch.randn(1003).to(dtype), torch.randint(1003, (301,))
    targets[::7] = -100

    def grads(as_type, function):
        h, w, b = (t.to(as_type, copy=True).requires_grad_() for t in (hidden, weight, bias))
        seen = w.t().contiguous().t() if transposed else w
        loss = function(h, seen, targets, bias=b, **settings)
        loss.backward()
        return [loss.detach(), h.grad, w.grad, b.grad]

    ours = grads(dtype, lambda *args, **kw: linear_cross_entropy(*args, **kw, backend="cpu"))
    exact, plain = grads(torch.float64, reference), grads(torch.bfloat16, reference)
    for name, a, p, x in zip(("loss", "dhidden", "dweight", "dbias"), ours, plain, exact):
        assert relative_error(a, x) <= 1.5 * relative_error(p, x) + 1e-5, name
    assert ours[1].dtype == dtype
    assert ours[0].dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_logits_far_from_zero_keep_their_differences(isa, backend):
    """A bias of 10^7, where fp32 numbers are one apart, and whole logits: exact sums."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.eye(3, requires_grad=True)
    weight = torch.randint(-4, 5, (37, 3), generator=generator).float().requires_grad_()
    targets = torch.tensor([3, 36, 0])
    bias = torch.full((37,), 1e7, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, backend=backend)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    exact = F.cross_entropy(F.linear(*leaves), targets)
    expected = torch.autograd.grad(exact, leaves)
    # Sums of 37 fp32 numbers.
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-6)


@needs_cpu
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_huge_logits_are_redone_relative_to_the_largest(isa, precision):
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 16) * 300, torch.randn(200, 16) * 30
    targets = torch.randint(200, (70,))
    torch.set_float32_matmul_precision(precision)
    try:
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none", backend="cpu")
        h = hidden.clone().requires_grad_()
        linear_cross_entropy(h, weight, targets, backend="cpu").backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="none")
    assert exact.max() > 1e4
    # 2^-8 is the rounding of one factor to bf16.
    assert relative_error(losses, exact) < (1e-6 if precision == "highest" else 2**-8)
    assert h.grad.isfinite().all()


@needs_cpu
def test_not_finite_numbers_propagate(isa):
    hidden, weight = torch.randn(5, 8), torch.randn(19, 8)
    hidden[1, 3], targets = math.nan, torch.arange(5)
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none", backend="cpu")
    assert losses.isnan().tolist() == [False, True, False, False, False]


@needs_cpu
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_out_target_has_an_infinite_loss(isa, smoothing):
    """As in PyTorch; the others have theirs, with smoothing infinite too."""
    hidden, weight, bias = torch.randn(5, 8), torch.randn(19, 8), torch.randn(19)
    bias[0], targets = -math.inf, torch.arange(5)
    options = {"reduction": "none", "label_smoothing": smoothing}
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, backend="cpu", **options)
    expected = F.cross_entropy(hidden @ weight.t() + bias, targets, **options)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_all_ignored_and_golden_numbers(backend):
    if backend == "cpu" and not _extension.cpu.loaded:
        pytest.skip("_cpu is not built")
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(19, 8, requires_grad=True)
    loss = linear_cross_entropy(
        hidden, weight, torch.full((6,), 3), ignore_index=3, backend=backend
    )
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    # -log of .1 .05 .02 .34 .11, by weights that are log-probabilities.
    probs = torch.tensor([0.1, 0.05, 0.02, 0.34, 0.11])
    weight = torch.stack((probs.log(), (1 - probs).log()))  # (V = 2, E = 5)
    losses = linear_cross_entropy(
        torch.eye(5), weight, torch.zeros(5, dtype=torch.int64), reduction="none", backend=backend
    )
    golden = torch.tensor([2.302585, 2.995732, 3.912023, 1.078810, 2.207275])
    torch.testing.assert_close(losses, golden, rtol=0, atol=1e-6)


@needs_cpu
def test_ignored_rows_are_not_read():
    hidden, weight = torch.randn(40, 8), torch.randn(19, 8)
    targets = torch.randint(19, (40,))
    targets[::2] = -100
    clean = linear_cross_entropy(hidden, weight, targets, backend="cpu")
    hidden[::2] = math.nan
    h = hidden.requires_grad_()
    loss = linear_cross_entropy(h, weight, targets, backend="cpu")
    loss.backward()
    assert loss.item() == clean.item()
    assert not h.grad[::2].any()
    assert h.grad[1::2].isfinite().all()


@needs_cpu
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_same_result_for_any_number_of_threads(isa, precision):
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 33), torch.randn(1500, 33)
    targets, bias = torch.randint(1500, (200,)), torch.randn(1500)
    results = []
    before = torch.get_num_threads()
    torch.set_float32_matmul_precision(precision)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
            loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], backend="cpu")
            loss.backward()
            results.append([loss.detach(), *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision("highest")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing": 0.1, "z_loss": 0.02}, {"softcap": 2.0, "label_smoothing": 0.1}],
)
def test_gradcheck(reduction, settings):
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (7, 3), 7)]
    targets = torch.tensor([1, 6, -100, 0])

    def function(h, w, b):
        return linear_cross_entropy(h, w, targets, bias=b, reduction=reduction, **settings)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_smoothing_keeps_what_logits_do_not_share(isa: str) -> None:
    """A bias of 1e6 leaves fp32 one digit; that of the mean logit must not be in the loss."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randint(-2, 3, (64, 16), generator=generator).float()
    weight = torch.randint(-4, 5, (1001, 16), generator=generator) / 4
    bias = torch.randint(-8, 9, (1001,), generator=generator) / 16 + 1e6
    targets = torch.randint(1001, (64,), generator=generator)
    exact = F.cross_entropy(
        hidden.double() @ weight.double().t() + bias.double(), targets, label_smoothing=0.3
    )
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, label_smoothing=0.3)
    # Every logit is exact in fp32; one digit less of the mean were 0.3 / 32.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_loss_scale_keeps_float16_gradients_in_range(backend: str) -> None:
    """A probability over the number of rows is below float16's smallest normal number, 6e-5."""
    if backend == "cpu" and not _extension.cpu.loaded:
        pytest.skip("no CPU kernels")
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1024, 32, generator=generator).half()
    weight = (torch.randn(2000, 32, generator=generator) / 6).half()
    targets = torch.randint(2000, (1024,), generator=generator)
    found = []
    for leaves, chosen, scale in (
        ((hidden, weight), backend, 2.0**14),
        ((hidden.double(), weight.double()), "torch", 1.0),
    ):
        leaves = [t.clone().requires_grad_() for t in leaves]
        loss = linear_cross_entropy(*leaves, targets, backend=chosen)
        grads = torch.autograd.grad(loss * scale, leaves)
        found.append([g.double() / scale for g in grads])
    for value, exact in zip(*found, strict=True):
        # Each gradient is rounded to float16's 2^-11 once, and so is each of its terms.
        assert (value - exact).norm() / exact.norm() < 2.0**-11
