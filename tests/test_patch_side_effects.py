"""`lmfast.patch` leaves alone what does more in its forward than compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_patch import Gated, HandGelu, HandLayerNorm, ScaledNorm, SpelledLinear, decoder, outcome
from torch import Tensor, nn

import lmfast
from lmfast.models import textbook


class CountingLinear(nn.Linear):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        CountingLinear.count += 1
        return x @ self.weight.T + self.bias


def counted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    hits = [0]

    @functools.wraps(forward)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        hits[0] += 1
        return forward(self, x)

    return wrapper


HITS = [0]


def with_forward(base: type, forward: Callable[..., Tensor], *args: object) -> nn.Module:
    return type(f"Counting{base.__name__}", (base,), {"forward": forward})(*args)


def counting_in_closure(base: type) -> Callable[..., Tensor]:
    hits = [0]
    # One that touches no other name.
    if base is nn.Linear:

        def product(self: nn.Module, x: Tensor) -> Tensor:
            hits[0] += 1
            return x @ self.weight.T + self.bias

        return product

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        hits[0] += 1
        return base.forward(self, x)  # type: ignore[attr-defined]

    return forward


def counting_attribute(base: type) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        type(self).hits = 1
        return own(self, x)

    own = base.forward  # type: ignore[attr-defined]
    return forward


def global_list(self: nn.Module, x: Tensor) -> Tensor:
    HITS[0] += 1
    return ScaledNorm.forward(self, x)  # type: ignore[arg-type]


class BufferNorm(HandLayerNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("hits", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.hits.add_(1)
        return super().forward(x)


def gated_with_counting_activation() -> nn.Module:
    module = Gated(F.silu)
    del module.act
    module.act = with_forward(HandGelu, counting_in_closure(HandGelu))
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_forward(nn.Linear, counted(SpelledLinear.forward), 8, 8),
        lambda: with_forward(nn.Linear, counting_in_closure(nn.Linear), 8, 8),
        lambda: with_forward(ScaledNorm, counted(ScaledNorm.forward), 8),
        lambda: with_forward(ScaledNorm, counting_in_closure(ScaledNorm), 8),
        lambda: with_forward(ScaledNorm, counting_attribute(ScaledNorm), 8),
        lambda: with_forward(ScaledNorm, global_list, 8),
        lambda: BufferNorm(8),
        lambda: with_forward(HandGelu, counted(HandGelu.forward)),
        lambda: with_forward(textbook.TextbookMLP, counted(textbook.TextbookMLP.forward), 8),
        lambda: with_forward(textbook.TextbookElman, counted(textbook.TextbookElman.forward), 8, 2),
        gated_with_counting_activation,
    ],
)
def test_what_does_something_on_the_side_stays(make: Callable[[], nn.Module]) -> None:
    module = make()
    kind = type(module)
    assert outcome(module) is None
    assert type(module) is kind


@pytest.mark.parametrize("kind", [textbook.TextbookHead, textbook.TextbookUnit])
def test_what_holds_parts_that_do_something_on_the_side_stays(kind: type) -> None:
    whole = decoder() if kind is textbook.TextbookHead else textbook.TextbookRecurrent(50, 16, 2, 0)

    def forward(self: nn.Module, x: Tensor, other: Tensor) -> Tensor:
        HITS[0] += 1
        return kind.forward(self, x, other)  # type: ignore[attr-defined]

    counting = type(kind.__name__, (kind,), {"forward": forward})
    for m in whole.modules():
        if type(m) is kind:
            m.__class__ = counting
    report = lmfast.patch(whole)
    reasons = [e.reason for e in report.kept if e.kind in ("TextbookAttention", "TextbookElman")]
    assert reasons
    assert all("it does more than compute: forward uses" in r for r in reasons)


def test_a_linear_layer_that_does_more_stays() -> None:
    assert outcome(CountingLinear(8, 8)) is None
    assert outcome(nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)) is None


def test_a_decorator_of_pytorch_hides_nothing() -> None:
    class Logging(ScaledNorm):
        @torch.autocast("cpu", enabled=False)
        def forward(self, x: Tensor) -> Tensor:
            HITS.append(1)
            return super().forward(x)

    assert outcome(Logging(8)) is None
