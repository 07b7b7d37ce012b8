"""`lmfast.patch` on models whose attention layers write the scores out themselves."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import lmfast
from lmfast import ops

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers.logging.set_verbosity_error()

from transformers_models import IDS, LEFT, assert_close, make  # noqa: E402

from lmfast.integrations._own_attention import _SUMS, calls_attention, form_of  # noqa: E402

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


def attention_of(model: Any) -> tuple[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The first layer with own attention, and the calls that it gets."""
    forms = (None, "attention_block")
    layer = next(m for m in model.modules() if calls_attention(m) or form_of(m) not in forms)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    with torch.no_grad():
        model(IDS, attention_mask=LEFT, use_cache=False)
    hook.remove()
    return layer, calls


@torch.no_grad()
def test_calls_by_position() -> None:
    model = make("mpt")
    layer, ((args, kwargs),) = attention_of(model)
    x, bias, mask = args[0], kwargs["position_bias"], kwargs["attention_mask"]
    expected = layer(x, bias, None, mask)
    lmfast.patch(model)
    for got in (layer(x, bias, None, mask), layer(x, bias, None, attention_mask=mask)):
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])
    got = layer(x, bias, attention_mask=mask, output_attentions=False)
    assert got[1] is None
    assert_close(got[0][LEFT.bool()], expected[0][LEFT.bool()])


@torch.no_grad()
def test_a_mask_changed_in_place_is_seen_and_no_sum_outlives_its_biases() -> None:
    model = make("bloom")
    twin = copy.deepcopy(model)
    lmfast.patch(model)
    layer, ((args, kwargs),) = attention_of(model)
    other = next(m for m in twin.modules() if type(m).__name__ == "BloomAttention")
    mask, alibi = kwargs["attention_mask"].clone(), kwargs["alibi"]
    kwargs = {**kwargs, "attention_mask": mask}
    lowest = torch.finfo(mask.dtype).min
    for key in (4, 5):
        mask[0, :, key + 1 :, key] = lowest
        assert_close(layer(*args, **kwargs)[0][0], other(*args, **kwargs)[0][0])
    alibi.mul_(2.0)
    assert_close(layer(*args, **kwargs)[0][0], other(*args, **kwargs)[0][0])
    copy.deepcopy(kwargs)  # nothing that cannot be copied was put on the tensors
    kept = weakref.ref(_SUMS[alibi][2])
    del args, kwargs, alibi
    gc.collect()
    assert kept() is None


@torch.no_grad()
@pytest.mark.parametrize("alibi", [False, True])
def test_without_a_mask_the_layer_is_causal(alibi: bool) -> None:
    model = make("falcon", alibi=alibi)
    layer, ((args, kwargs),) = attention_of(model)
    kwargs = {**kwargs, "attention_mask": None}
    expected = layer(*args, **kwargs)[0]
    lmfast.patch(model)
    with mock.patch.object(ops, "attention", wraps=ops.attention) as called:
        assert_close(layer(*args, **kwargs)[0], expected)
    assert called.call_count == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt_neo", "falcon"])
def test_a_mask_of_bool_does_what_it_did(kind: str) -> None:
    model = make(kind, **({"attn_implementation": "eager"} if kind == "falcon" else {}))
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    expected = model(IDS, attention_mask=seen).logits
    lmfast.patch(model)
    assert_close(model(IDS, attention_mask=seen).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bloom", "gpt_neo", "mpt"])
def test_queries_that_see_no_key_get_zeros(kind: str) -> None:
    model = make(kind)
    lmfast.patch(model)
    layer, ((args, kwargs),) = attention_of(model)
    out = layer(*args, **{**kwargs, "output_attentions": False})[0][1, :4]
    last = layer.dense if kind == "bloom" else layer.out_proj
    expected = torch.zeros_like(out) if last.bias is None else last.bias.expand_as(out)
    if kind == "bloom":
        expected = expected + args[1][1, :4]  # the residual
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo", "falcon", "mpt"])
def test_gradient_checkpointing(kind: str) -> None:
    model = make(kind)
    patched = copy.deepcopy(model)
    lmfast.patch(patched)
    patched.gradient_checkpointing_enable()
    grads = []
    for m in (model, patched):
        drop(m.train(), 0.0)
        for part in m.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            if hasattr(part, "hidden_dropout"):
                part.hidden_dropout = 0.0
        m(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in m.parameters()])
    scale = max(g.abs().max() for g in grads[0] if g is not None)
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        # fp32 sums in another order, as in the test of values above.
        assert a is None or (a - b).abs().max() <= 2e-5 * scale


def test_unpatching_without_an_attention_implementation() -> None:
    model = make("llama")
    lmfast.patch(model)
    model.config._attn_implementation = None
    lmfast.unpatch(model)
    assert not any(calls_attention(m) for m in model.modules())


@torch.no_grad()
def test_rotary_tables_changed_in_place_are_seen() -> None:
    model = make("llama")
    rotary = model.model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(9)[None])
    x = torch.randn(1, 9, model.config.hidden_size)
    twin = copy.deepcopy(model).model.layers[0].self_attn
    lmfast.patch(model)
    layer = model.model.layers[0].self_attn
    for _ in range(2):
        assert_close(layer(x, (cos, sin), None)[0], twin(x, (cos, sin), None)[0])
        cos.copy_(cos.flip(1))
        sin.copy_(sin.flip(1))
