"""`lmfast.patch` on transformers' models: every decoder architecture, before and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lmfast

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers.logging.set_verbosity_error()

from transformers_models import ARCHITECTURES, make  # noqa: E402

from lmfast.integrations.transformers import LazyLogits  # noqa: E402

IDS = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


def gradients(model: Any, **inputs: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss, logits and gradients of a training step."""
    model.zero_grad()
    out = model(IDS, labels=IDS, **inputs)
    out.loss.backward()
    return out.loss, out.logits, [None if p.grad is None else p.grad for p in model.parameters()]


def assert_close(got: Tensor, expected: Tensor, rtol: float = 2e-5) -> None:
    """Equal up to fp32 rounding through a few layers, relative to the largest number."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= rtol * expected.abs().max()


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_architecture(kind: str) -> None:
    model = make(kind)
    classes = [type(m) for m in model.modules()]
    before = model.config._attn_implementation
    loss, logits, grads = gradients(model)
    with torch.no_grad():
        padded = model(IDS, attention_mask=LEFT).logits
    tokens = model.generate(IDS, attention_mask=LEFT, max_new_tokens=6, do_sample=False)

    report = lmfast.patch(model)
    assert any(e.kind == "Linear" or e.kind == "Conv1D" for e in report.replaced)
    new_loss, new_logits, new_grads = gradients(model)
    assert_close(new_loss, loss)
    assert isinstance(new_logits, LazyLogits)
    assert_close(new_logits, logits)
    scale = max(g.abs().max() for g in grads if g is not None)
    for new, old in zip(new_grads, grads, strict=True):
        assert (new is None) == (old is None)
        if new is not None and old is not None:
            assert (new - old).abs().max() <= 2e-5 * scale
    with torch.no_grad():
        real = LEFT.bool()
        assert_close(model(IDS, attention_mask=LEFT).logits[real], padded[real])
    assert torch.equal(
        model.generate(IDS, attention_mask=LEFT, max_new_tokens=6, do_sample=False), tokens
    )

    lmfast.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == before
