"""linear_cross_entropy and selected_log_probs: values, gradients, settings, memory, modes."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import lmfast
from lmfast import _extension
from lmfast._dispatch import BackendError, implementation
from lmfast.ops import linear_cross_entropy, selected_log_probs
from lmfast.ops.linear_cross_entropy import OP
from lmfast.testing import FP64_TOLERANCE, relative_error, unit_in_last_place

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
        if {"softcap", "label_smoothing"} <= sample.kwargs.keys():
            with pytest.raises(BackendError, match="torch backend only"):
                linear_cross_entropy(*sample.args, **sample.kwargs, backend="cpu")
        else:
            check_sample(sample, "cpu")


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_products(medium, dtype):
    """ "medium" and bf16 inputs: at most 1.5 times the error of PyTorch's bf16 products."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(130, 96).to(dtype), (torch.randn(517, 96) * 0.2).to(dtype)
    targets = torch.randint(517, (130,))

    def grads(h, w, function):
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(h, w)
        loss.backward()
        return [loss.detach(), h.grad, w.grad]

    ours = grads(hidden, weight, lambda h, w: linear_cross_entropy(h, w, targets, backend="cpu"))
    exact = grads(hidden.double(), weight.double(), lambda h, w: reference(h, w, targets))
    plain = grads(hidden.bfloat16(), weight.bfloat16(), lambda h, w: reference(h, w, targets))
    for a, p, x in zip(ours, plain, exact):
        assert relative_error(a, x) <= 1.5 * relative_error(p, x) + 1e-5
    assert ours[1].dtype == dtype
    assert ours[0].dtype == torch.float32


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


def layer():
    torch.manual_seed(0)
    return (
        torch.randn(9, 16, requires_grad=True),
        torch.randn(16, 35).requires_grad_(),
        torch.randn(35, requires_grad=True),
        torch.randint(35, (9,)),
    )


def test_gradients_do_not_change_what_they_are_given():
    hidden, weight, _, targets = layer()
    loss = linear_cross_entropy(hidden, weight.t(), targets)
    incoming = torch.tensor(3.0)
    loss.backward(incoming, retain_graph=True)
    first = weight.grad.clone()
    assert incoming.item() == 3.0
    assert weight.grad.stride() == weight.stride()
    loss.backward(incoming)
    torch.testing.assert_close(weight.grad, 2 * first)


def test_only_the_gradients_needed():
    hidden, weight, bias, targets = layer()
    frozen = linear_cross_entropy(hidden, weight.t().detach(), targets)
    frozen.backward()
    alone = hidden.grad.clone()
    hidden.grad = None
    linear_cross_entropy(hidden, weight.t(), targets, bias=bias.detach()).backward()
    assert bias.grad is None
    hidden.grad = None
    linear_cross_entropy(hidden.detach(), weight.t(), targets, bias=bias).backward()
    assert hidden.grad is None
    assert bias.grad.abs().sum() > 0
    assert alone.abs().sum() > 0
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight.t(), targets).requires_grad


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(backend, reduction):
    hidden, weight, bias, targets = layer()

    def function(h, w, b):
        return linear_cross_entropy(
            h, w.t(), targets, bias=b, reduction=reduction, backend=backend
        ).sum()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        for t in (hidden, weight, bias):
            t.grad = None
        loss = f(hidden, weight, bias)
        (2 * loss).backward()
        results.append([loss.detach(), hidden.grad, weight.grad, bias.grad])
    torch.testing.assert_close(results[0], results[1])


@needs_cpu
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    hidden, weight, bias, targets = (t.detach() for t in layer())
    weight = weight.t() if transposed else weight.t().contiguous()
    op = torch.ops.lmfast.linear_cross_entropy.default
    settings = (-100, 1, 0.0, 0.0, 0.0, False, True, True, True)
    torch.library.opcheck(op, (hidden, weight, targets, bias, None, None, *settings))


def test_autocast_takes_bf16_products_and_keeps_fp32_gradients():
    hidden, weight, _, targets = layer()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight.t(), targets)
    loss.backward()
    exact = F.cross_entropy(hidden.double() @ weight.double(), targets)
    assert loss.dtype == weight.grad.dtype == torch.float32
    # Rounding 16 products of factors near 1 to bf16 (2^-9): about 1e-2 on a logit.
    assert 0 < abs(loss.item() - exact.item()) < 2e-2


@needs_cpu
def test_mixed_dtypes():
    hidden, weight, _, targets = layer()
    loss = linear_cross_entropy(hidden.bfloat16(), weight.t(), targets, backend="cpu")
    exact = F.cross_entropy(hidden.bfloat16().double() @ weight.double(), targets)
    assert abs(loss.item() - exact.item()) < 1e-6
    loss.backward()
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": torch.zeros(5, 3)}, ValueError, "weight must have shape"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must have dtype torch.int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "leading dimensions"),
        ({"targets": torch.tensor([0, 5])}, ValueError, r"targets must be in \[0, 5\)"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ({"z_loss": -1.0}, ValueError, "z_loss must not be negative"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor"),
    ],
)
def test_errors(changes, error, words):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 1]),
        **changes,
    }
    with pytest.raises(error, match=words):
        linear_cross_entropy(**arguments)


def test_selected_log_probs():
    hidden, weight, bias, targets = layer()
    targets[3] = -100
    value = selected_log_probs(hidden, weight.t(), targets, bias=bias, temperature=0.5)
    logits = (hidden.double() @ weight.double() + bias) / 0.5
    expected = logits.log_softmax(-1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    expected = torch.where(targets < 0, 0.0, expected)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    value.sum().backward()
    assert hidden.grad[3].abs().sum() == 0
    with pytest.raises(ValueError, match="temperature must be positive"):
        selected_log_probs(hidden, weight.t(), targets, temperature=0.0)


@needs_cpu
def test_wide_rows_are_left_to_pytorch(capsys):
    hidden, weight, targets = torch.randn(3, 2500), torch.randn(7, 2500), torch.tensor([0, 1, 6])
    assert lmfast.explain("linear_cross_entropy", hidden, weight, targets) == "torch"
    assert "faster in chunks" in capsys.readouterr().out
    run_cpu = implementation("linear_cross_entropy", "cpu").forward
    args = OP.check(hidden, weight, targets)
    torch.testing.assert_close(run_cpu(*args), reference(hidden, weight, targets))


@needs_cpu
def test_calls_from_several_threads():
    hidden, weight, _, targets = (t.detach() for t in layer())
    expected = linear_cross_entropy(hidden, weight.t(), targets)
    results = [None] * 4

    def work(i):
        for _ in range(20):
            results[i] = linear_cross_entropy(hidden, weight.t(), targets)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(r, expected) for r in results)


MEMORY = """
import resource, sys, torch
from lmfast.ops import linear_cross_entropy
precision, transposed = sys.argv[1], sys.argv[2] == "1"
torch.set_float32_matmul_precision(precision)
hidden, weight = torch.randn(3712, 128), torch.randn(32011, 128) * 0.05
if transposed:
    weight = weight.t().contiguous().t()
targets = torch.randint(32011, (3712,))
linear_cross_entropy(hidden[:64].clone().requires_grad_(), weight[:64].clone().requires_grad_(),
                     targets[:64] % 64, backend="cpu").backward()
hidden.requires_grad_(), weight.requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, targets, backend="cpu").backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@needs_cpu
@pytest.mark.parametrize("level", [i for i in _extension.available_cpu_isas() if i != "default"])
@pytest.mark.parametrize("transposed", ["0", "1"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_memory(level, transposed, precision):
    """Beyond what is live before, at most 64 MB, gradients (18 MB) included; logits are 475 MB."""
    if level != "amx" and (precision == "medium" or level == "avx2"):
        pytest.skip("the same buffers as with highest precision and avx512")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "LMFAST_CPU_ISA": level, "PYTHONPATH": root}
    # Without glibc's caching of large blocks the peak is what is in use.
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, precision, transposed],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(out.stdout) <= 64, out.stdout
