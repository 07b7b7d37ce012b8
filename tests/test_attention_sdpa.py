"""Attention by PyTorch's fused kernels: when it is chosen, and that it computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lmfast
from lmfast._dispatch import ops, select, use_backend
from lmfast.ops._attention_reference import reference
from lmfast.ops._attention_sdpa import fits_sdpa, sdpa

OP = ops()["attention"]


def made(
    length: int, keys: int, heads: tuple[int, int] = (2, 2), width: int = 8,
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    q = torch.empty(1, heads[0], length, width, dtype=dtype, device=device)
    return [q, *(q.new_empty(1, heads[1], keys, width) for _ in range(2))]


@pytest.mark.parametrize(
    ("tensors", "options", "fits"),
    [
        (made(512, 512), {}, True),
        (made(512, 512, (4, 2), 256, torch.float16), {"q_offset": 0}, True),
        (made(600, 700), {"causal": False}, True),
        (made(511, 511), {}, False),
        (made(512, 600), {}, False),  # the last queries of a longer sequence
        (made(512, 512), {"q_offset": 3}, False),
        (made(512, 512, width=12), {}, False),
        (made(512, 512, dtype=torch.float32), {}, False),
        (made(512, 512), {"window": 9}, False),
        (made(512, 512), {"softcap": 9.0}, False),
        (made(512, 512), {"lengths": torch.tensor([5])}, False),
        (made(512, 512), {"mask": torch.ones(512, 512, dtype=torch.bool)}, False),
        (made(512, 512), {"sinks": torch.ones(2)}, False),
        (made(512, 512), {"alibi": torch.ones(2)}, False),
    ],
)
def test_what_fits(tensors: list[Tensor], options: dict[str, Any], fits: bool) -> None:
    assert fits_sdpa(*OP.check(*tensors, **options)) == fits


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_computes_the_same(causal: bool, heads: tuple[int, int], tokens_first: bool) -> None:
    def normal(h: int) -> Tensor:
        x = torch.randn(2, 13, h, 8, dtype=torch.float64)
        x = x.transpose(1, 2)
        return (x if tokens_first else x.contiguous()).requires_grad_()

    tensors = [normal(heads[0]), normal(heads[1]), normal(heads[1])]
    args = OP.check(*tensors, causal=causal, scale=0.3)
    found, expected = sdpa(*args), reference(*args)
    assert found.stride() == torch.empty_like(tensors[0]).stride()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    seed = torch.randn_like(expected)
    grads = [
        torch.autograd.grad(out, tensors, seed, create_graph=True) for out in (found, expected)
    ]
    for value, e in zip(*grads, strict=True):
        torch.testing.assert_close(value, e, rtol=1e-10, atol=1e-11)
    second = [torch.autograd.grad(sum((g * g).sum() for g in both), tensors) for both in grads]
    for value, e in zip(*second, strict=True):
        torch.testing.assert_close(value, e, rtol=1e-9, atol=1e-10)


def test_chosen_on_a_gpu_and_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        long, short = made(512, 512, device="cuda"), made(64, 64, device="cuda")
        args = OP.check(*long)
        assert select(OP, args).backend == "torch"
        assert select(OP, OP.check(*short)).backend == "triton"
        assert select(OP, args, "triton").backend == "triton"
        with use_backend("attention=triton"):
            assert select(OP, args).backend == "triton"
    assert select(OP, OP.check(*made(512, 512))).backend != "triton"


def test_explain_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTensorMode():
        long = made(512, 512, device="cuda")
        assert lmfast.explain("attention", *long) == "torch"
    out = capsys.readouterr().out
    assert "(scaled_dot_product_attention: long, plain, 16 bit)" in out
    assert "triton  possible" in out
