"""The output layer and its loss, forward and backward: ours, PyTorch eager and its own fused op.

    pytest benchmarks/bench_linear_cross_entropy.py --benchmark-enable --benchmark-group-by=group

The shape is that of the reference models (128 sequences of 29 tokens, E = 128, V = 32,011).
Arithmetic: 3 products of 30.4 GFLOP each.
"""

import pytest
import torch
import torch.nn.functional as F

from lmfast.ops import linear_cross_entropy

N, E, V = 3712, 128, 32011


def ours(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets)


def eager(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).float(), targets)


def torch_fused(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets)


def chunked(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets, backend="torch")


@pytest.mark.parametrize("layout", ["VE", "EV"])
@pytest.mark.parametrize("kind", ["fp32", "medium", "bf16"])
@pytest.mark.parametrize("function", [ours, eager, torch_fused, chunked], ids=lambda f: f.__name__)
def test_forward_and_backward(benchmark, function, kind, layout):
    benchmark.group = f"linear_cross_entropy {kind} weight {layout}"
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(N, E).to(dtype).requires_grad_()
    weight = (torch.randn(V, E) * 0.05).to(dtype)
    weight = (weight.t().contiguous().t() if layout == "EV" else weight).requires_grad_()
    targets = torch.randint(V, (N,))
    if function is torch_fused and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no F.linear_cross_entropy")

    def step():
        hidden.grad = weight.grad = None
        function(hidden, weight, targets).backward()

    torch.set_float32_matmul_precision("medium" if kind == "medium" else "highest")
    try:
        benchmark.pedantic(step, rounds=7, warmup_rounds=2)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_loss_alone(benchmark, kind):
    benchmark.group = f"linear_cross_entropy {kind} loss alone"
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    hidden, weight = torch.randn(N, E).to(dtype), (torch.randn(V, E) * 0.05).to(dtype)
    targets = torch.randint(V, (N,))
    benchmark.pedantic(ours, (hidden, weight, targets), rounds=7, warmup_rounds=2)
