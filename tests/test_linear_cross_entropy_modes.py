"""linear_cross_entropy under autograd, torch.compile, autocast and threads; errors; memory."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import lmfast
from lmfast import _extension
from lmfast._dispatch import implementation
from lmfast.ops import linear_cross_entropy, selected_log_probs
from lmfast.ops.linear_cross_entropy import OP

needs_cpu = pytest.mark.skipif(not _extension.cpu.loaded, reason="_cpu is not built")


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
    torch.testing.assert_close(run_cpu(*args), OP.reference(*args))


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
    bf16_products = level == "amx" or (level == "avx512" and "bf16" in _extension.cpu_features())
    if level == "avx2" or (precision == "medium" and not bf16_products):
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
