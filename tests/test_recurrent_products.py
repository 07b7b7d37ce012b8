"""Products over all steps of a recurrent layer, by AMX in fp32's accuracy where it is faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lmfast
from lmfast.ops import _linear_cpu as products
from lmfast.testing import assert_within_error_rule

EVERY_LAYER = pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "TextbookGRU"])


def make(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer whose products have 300 rows and whose weights' gradients have 288 or more."""
    layer = getattr(lmfast.nn, kind)(96, 288, bidirectional=True, batch_first=True)
    return layer, torch.randn(20, 15, 96)


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)[0]
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])]


@EVERY_LAYER
def test_all_large_products_go_to_the_kernel_where_there_is_one(
    kind: str, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(kind)
    lowered = lmfast._extension.cpu_isa() == "amx"
    if lowered:
        lmfast._extension.set_cpu_isa("avx512")
    try:
        plain = results(layer, x)
        shapes = []

        def product(a: Tensor, b: Tensor, bias: Tensor | None, relu: bool, parts: int) -> Tensor:
            for t in (a, b):
                assert t.dtype == torch.float32
                assert 1 in t.stride()
            assert (parts, relu) == (3, False)
            assert bias is None or bias.is_contiguous()
            shapes.append((*a.shape, b.shape[0]))
            return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())

        monkeypatch.setattr(products, "_has_tiles", lambda rounded: True)
        monkeypatch.setattr(products, "_product", product)
        found = results(layer, x)
    finally:
        if lowered:
            lmfast._extension.set_cpu_isa("amx")
    gates = {"RNN": 1, "LSTM": 4}.get(kind, 3)
    # The input's product, the gradients of x and w_ih and the LSTM's of w_hh (others sum so few
    # rows in chunks), once for each direction.
    assert len(shapes) == 2 * (4 if kind == "LSTM" else 3)
    assert shapes.count((300, 96, gates * 288)) == 2
    assert shapes.count((300, gates * 288, 96)) == 2
    assert shapes.count((gates * 288, 300, 96)) == 2
    for f, p in zip(found, plain, strict=True):
        torch.testing.assert_close(f, p, rtol=1e-4, atol=1e-4 * p.detach().abs().max().item())


@EVERY_LAYER
def test_large_layers_obey_the_error_rule(kind: str, cpu_isa: str) -> None:
    layer, x = make(kind)
    found = results(layer, x)
    with lmfast.use_backend("torch"):
        plain = results(layer, x)
        exact = results(layer.double(), x.double())
    names = ["y", "x", *(n for n, _ in layer.named_parameters())]
    for name, f, p, e in zip(names, found, plain, exact, strict=True):
        assert_within_error_rule(f, p, e, f"{kind} {name}")


@EVERY_LAYER
def test_large_layers_do_not_depend_on_the_threads(kind: str, needs_cpu_kernels: None) -> None:
    if lmfast._extension.cpu_isa() == "default":
        pytest.skip("large products are PyTorch's, whose sums depend on the threads")
    layer, x = make(kind)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(layer, x))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("by_columns", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 0), (1, 100, 33), (7, 13, 5), (65, 67, 300), (700, 65, 131), (130, 128, 2000)]
)
@pytest.mark.parametrize("chunk", [16, 128])
def test_plain_products(
    shape: tuple[int, int, int], by_columns: tuple[bool, bool], chunk: int, cpu_isa: str
) -> None:
    rows, columns, depth = shape
    a, b = (
        torch.randn(depth, n).t() if turned else torch.randn(n, depth)
        for n, turned in zip((rows, columns), by_columns)
    )
    bias = torch.randn(columns)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append([products._plain_product(a, b, given, chunk) for given in (bias, None)])
    finally:
        torch.set_num_threads(threads)
    exact = [a.double() @ b.t().double() + bias, a.double() @ b.t().double()]
    for other in found:
        for f, first, e in zip(other, found[0], exact, strict=True):
            assert torch.equal(f, first)
            # Partial sums of i numbers of order 1 have the size sqrt(i), and roundings of them add
            # up as a random walk: 0.3 sqrt(depth n) within chunks of n, 0.3 depth / sqrt(n) between
            # them, in units of 2^-24. Ten deviations, and twice as many roundings without FMA.
            n = max(1, min(chunk, depth))
            walk = (depth * n) ** 0.5 + depth / n**0.5
            torch.testing.assert_close(f.double(), e, rtol=0, atol=6e-8 * (2 + 5 * walk))
    # A row does not depend on the others.
    assert torch.equal(products._plain_product(a[:1].contiguous(), b, None, chunk), found[0][1][:1])


def test_opcheck_of_plain_products(needs_cpu_kernels: None) -> None:
    torch.library.opcheck(
        products._plain_product, (torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), 128)
    )
    with pytest.raises(RuntimeError, match="a and b must have rows of one length"):
        products._plain_product(torch.randn(3, 4), torch.randn(5, 3), None, 128)
