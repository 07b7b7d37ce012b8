"""additive_attention: the golden numbers, padding, and how exact it is on average."""

from __future__ import annotations

import pytest
import torch
from golden import fill

from lmfast.ops import additive_attention
from lmfast.testing import relative_error

SOURCE = torch.tensor(
    [[0.1, 0.2, 0.6], [0.2, 0.1, 0.4], [0.1, 0.3, 0.3], [0, 0.7, 0.1], [0.5, 0.2, 0.7], [0, 0, 0]],
    dtype=torch.float64,
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])


def golden_arguments(dtype: torch.dtype) -> list[torch.Tensor]:
    """score_j = v . tanh(W1 s + b1 + W2 h_j + b2), both biases with the keys."""
    query = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    keys = SOURCE @ fill(32, (3, 3)).t() + fill(31, (3,)) + fill(33, (3,))
    arguments = [query, keys[None], SOURCE[None], fill(30, (3, 3)), fill(34, (3,))]
    return [t.to(dtype) for t in arguments]


@BACKENDS
@pytest.mark.parametrize("steps", [0, 3])
def test_golden_numbers(backend: str, steps: int, needs_cpu_kernels: None) -> None:
    dtype, tolerance = (torch.float64, 1e-9) if backend == "torch" else (torch.float32, 1e-6)
    query, *rest = golden_arguments(dtype)
    if steps:
        query = query[:, None].expand(1, steps, 3)
    context, weights = additive_attention(query, *rest, backend=backend)
    expected = [0.167462705, 0.165520885, 0.166237178, 0.169103341, 0.174084595, 0.157591296]
    mask = torch.tensor([[True] * 5 + [False]])
    masked, masked_weights = additive_attention(query, *rest, mask=mask, backend=backend)
    for found, golden in (
        (weights, expected),
        (context, [0.153516463, 0.253105041, 0.355326681]),
        (masked, [0.182235134, 0.300453971, 0.421798444]),
    ):
        golden = torch.tensor(golden, dtype=dtype).expand_as(found)
        torch.testing.assert_close(found, golden, rtol=0, atol=tolerance)
    assert (masked_weights[..., 5] == 0).all()


@BACKENDS
def test_padding_has_no_effect_whatever_it_holds(backend: str, needs_cpu_kernels: None) -> None:
    query, keys, values = torch.randn(2, 3, 5), torch.randn(2, 6, 7), torch.randn(2, 6, 4)
    w_query, v = torch.randn(7, 5), torch.randn(7)
    expected = additive_attention(query, keys[:, :4], values[:, :4], w_query, v, backend=backend)
    keys[:, 4:], values[:, 4:] = float("nan"), float("inf")
    leaves = [t.requires_grad_() for t in (query, keys, values, w_query, v)]
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    context, weights = additive_attention(*leaves, mask=mask, backend=backend)
    torch.testing.assert_close(context[0], expected[0][0])
    torch.testing.assert_close(weights[0, :, :4], expected[1][0])
    assert (context[1] == 0).all()
    assert (weights[1] == 0).all()
    for grad in torch.autograd.grad(context.sum() + weights.square().sum(), leaves):
        assert grad.isfinite().all()
        if grad.shape[0] == 2:
            assert (grad[1] == 0).all()
        if grad.shape[1:2] == (6,):
            assert (grad[:, 4:] == 0).all()


def test_is_as_exact_as_pytorch_on_average(cpu_isa: str) -> None:
    """The error rule looks at few numbers; over many draws luck averages out."""
    ours, plain = torch.zeros(7), torch.zeros(7)
    for seed in range(12):
        torch.manual_seed(seed)
        shapes = [(2, 6, 5), (2, 90, 40), (2, 90, 9), (40, 5), (40,)]
        inputs = [torch.randn(s) for s in shapes]

        def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
            leaves = [t.to(dtype).requires_grad_() for t in inputs]  # noqa: B023
            found = additive_attention(*leaves, backend=backend)
            loss = sum((f * torch.linspace(-1, 1, f.numel()).view_as(f)).sum() for f in found)
            return [*found, *torch.autograd.grad(loss, leaves)]

        exact = results("torch", torch.float64)
        for into, backend in ((ours, "cpu"), (plain, "torch")):
            found = results(backend, torch.float32)
            into += torch.tensor([relative_error(f, e) for f, e in zip(found, exact, strict=True)])
    # Seen at every level: 0.6 to 1.05 times PyTorch's error.
    assert (ours <= 1.15 * plain).all(), ours / plain


def test_errors_name_the_argument() -> None:
    good = [torch.zeros(2, 5), *(torch.zeros(2, 6, n) for n in (7, 4)), torch.zeros(7, 5)]
    good.append(torch.zeros(7))
    for position, wrong, message in (
        (0, torch.zeros(5), "query must be"),
        (0, torch.zeros(3, 5), "keys must have shape"),
        (1, torch.zeros(6, 7), "keys must have 3 dimensions"),
        (2, torch.zeros(2, 5, 4), "values must have shape"),
        (3, torch.zeros(5, 7), "w_query must have shape"),
        (4, torch.zeros(6), "v must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            additive_attention(*good[:position], wrong, *good[position + 1 :])
    with pytest.raises(TypeError, match="values must have query's dtype"):
        additive_attention(good[0], good[1], good[2].double(), *good[3:])
    with pytest.raises(ValueError, match="mask must have shape"):
        additive_attention(*good, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        additive_attention(*good, mask=torch.ones(2, 6))
