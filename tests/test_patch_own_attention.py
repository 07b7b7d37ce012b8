"""`lmfast.patch` on models whose attention layers write the scores out themselves."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import lmfast

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers.logging.set_verbosity_error()

from transformers_models import IDS, LEFT, assert_close, make  # noqa: E402

from lmfast.integrations._own_attention import calls_attention  # noqa: E402

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {}),
    ("bloom", {"n_head": 2, "apply_residual_connection_post_layernorm": True}),
    ("gpt_neo", {}),
    ("falcon", {}),
    ("falcon", {"attn_implementation": "eager"}),
    ("falcon", {"multi_query": False, "parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"alibi": True}),
    ("falcon", {"alibi": True, "attn_implementation": "eager"}),
    ("mpt", {}),
    ("mpt", {"n_heads": 2, "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.4}}),
]
# Nothing is predicted from padding, whose rows see no key.
LABELS = IDS.masked_fill(LEFT == 0, -100)
LABELS[1, 4] = -100
IDS_OF_CASES = [f"{kind}-{'-'.join(map(str, more.values()))}" for kind, more in CASES]


@pytest.fixture(params=CASES, ids=IDS_OF_CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and its patched copy."""
    kind, more = request.param
    model = make(kind, **more)
    patched = copy.deepcopy(model)
    lmfast.patch(patched)
    assert sum(calls_attention(m) for m in patched.modules()) == 2
    return model, patched


def drop(model: Any, share: float) -> None:
    """Sets the dropout of attention weights."""
    for m in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(m, name, None), torch.nn.Dropout):
                getattr(m, name).p = share
        if hasattr(m, "attn_dropout_p"):
            m.attn_dropout_p = share


def test_values_gradients_weights_and_dropout(pair: tuple[Any, Any]) -> None:
    model, patched = pair
    holes = LEFT.clone()
    holes[0, 3] = holes[1, 6] = 0  # positions of biases by distance skip what is hidden
    with torch.no_grad():
        for mask in (torch.ones_like(LEFT), LEFT, LEFT.flip(1), holes):
            real = mask.bool()
            assert_close(
                patched(IDS, attention_mask=mask).logits[real],
                model(IDS, attention_mask=mask).logits[real],
            )
        expected = model(IDS, output_attentions=True).attentions
        for a, b in zip(patched(IDS, output_attentions=True).attentions, expected, strict=True):
            assert_close(a, b)
    for share in (0.0, 0.5):
        losses: list[Tensor] = []
        grads: list[list[Tensor | None]] = []
        for m in (model, patched):
            drop(m.train(), share)
            torch.manual_seed(3)
            m.zero_grad()
            loss = m(IDS, attention_mask=holes, labels=LABELS).loss
            loss.backward()
            losses.append(loss.detach())
            grads.append([p.grad for p in m.parameters()])
        torch.testing.assert_close(losses[1], losses[0])
        scale = max(g.abs().max() for g in grads[0] if g is not None)
        for a, b in zip(grads[1], grads[0], strict=True):
            if a is not None and b is not None:
                assert (a - b).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo", "falcon", "mpt"])
def test_other_dtypes_and_autocast(kind: str) -> None:
    model = make(kind)
    exact = copy.deepcopy(model).double()(IDS).logits
    patched = copy.deepcopy(model)
    lmfast.patch(patched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        off = (patched(IDS).logits.double() - exact).abs().max()
        theirs = (model(IDS).logits.double() - exact).abs().max()
    # Roundings of the same count, not the same ones: half as much again, and one unit of bf16.
    assert off <= 1.5 * theirs + 2**-8 * exact.abs().max()
    model, patched = model.bfloat16(), patched.bfloat16()
    with torch.no_grad():
        off = (patched(IDS).logits.double() - exact).abs().max()
        theirs = (model(IDS).logits.double() - exact).abs().max()
    assert off <= 1.5 * theirs + 2**-8 * exact.abs().max()


def test_a_layer_that_differs_is_left_with_the_reason() -> None:
    model = make("bloom")
    kind = type(model.transformer.h[0].self_attention)

    class Other(kind):  # type: ignore[misc, valid-type]
        @functools.wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return out * 1.01, weights

    model.transformer.h[0].self_attention.__class__ = Other
    report = lmfast.patch(model)
    (entry,) = [e for e in report.kept if e.kind == "Other"]
    assert "other values in training" in entry.reason
    assert "within 1 layer," in str(report)


def test_unpatched_attention_is_the_same_as_before(pair: tuple[Any, Any]) -> None:
    model, patched = pair
    lmfast.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(patched(IDS).logits, model(IDS).logits)


def test_more_keys_than_biases_are_refused() -> None:
    model = make("mpt", max_seq_len=8)
    lmfast.patch(model)
    with pytest.raises(ValueError, match="biases for 8 positions, got 9 keys"):
        model(IDS)
