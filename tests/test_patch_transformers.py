"""`lmfast.patch` on transformers' models: caches, dtypes, losses, copies, files, versions."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import lmfast

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers.logging.set_verbosity_error()

from transformers_models import ARCHITECTURES, IDS, LEFT, assert_close, gradients, make  # noqa: E402

from lmfast.integrations import transformers as integration  # noqa: E402
from lmfast.integrations.transformers import LazyLogits, LMFastCache  # noqa: E402


def patched(kind: str = "llama", **more: Any) -> Any:
    model = make(kind, **more)
    lmfast.patch(model)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox"])
def test_a_prompt_in_chunks(kind: str) -> None:
    model = patched(kind)
    for cache in (None, LMFastCache(model.config)):
        with torch.no_grad():
            positions = (LEFT.cumsum(1) - 1).clamp_min(0)
            # Left padding shifts positions, which a model called directly is told.
            whole = model(IDS, attention_mask=LEFT, position_ids=positions).logits
            first = model(
                IDS[:, :5],
                attention_mask=LEFT[:, :5],
                position_ids=positions[:, :5],
                past_key_values=None if cache is None else LMFastCache(model.config),
                use_cache=True,
            )
            rest = model(
                IDS[:, 5:],
                attention_mask=LEFT,
                position_ids=positions[:, 5:],
                past_key_values=first.past_key_values,
            )
        assert_close(rest.logits, whole[:, 5:])


def test_cache_operations_match_transformers_own() -> None:
    model = patched()
    ours: Any = LMFastCache(model.config)
    theirs: Any = transformers.DynamicCache(config=model.config)
    assert ours.get_seq_length() == 0
    assert ours.batch_size == -1

    def feed(ids: Tensor) -> None:
        with torch.no_grad():
            a = model(ids, past_key_values=ours).logits
            b = model(ids, past_key_values=theirs).logits
        assert_close(a, b)
        assert ours.get_seq_length() == theirs.get_seq_length()

    feed(IDS)
    for operation in (
        lambda c: c.crop(-3),
        lambda c: c.batch_repeat_interleave(3),
        lambda c: c.reorder_cache(torch.tensor([5, 0, 0, 3, 4, 1])),
        lambda c: c.batch_select_indices(torch.tensor([0, 2, 3])),
    ):
        operation(ours)
        operation(theirs)
        rows = len(ours.kv.lengths)
        feed(IDS[:1, :2].repeat(rows, 1) + torch.arange(rows)[:, None] % 3)
    ours.batch_select_indices(torch.tensor([True, False, True]))
    assert ours.batch_size == 2
    ours.reset()
    assert ours.get_seq_length() == 0
    with pytest.raises(ValueError, match="tokens_to_remove must be negative"):
        ours.crop(2)
    config = copy.deepcopy(model.config)
    config.layer_types = ["linear_attention"] * 2
    with pytest.raises(ValueError, match="linear_attention"):
        LMFastCache(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = make("llama").to(dtype)
    twin = copy.deepcopy(model)
    lmfast.patch(model)
    reference = copy.deepcopy(twin).double()
    with torch.no_grad():
        exact = reference(IDS).logits
        off = (model(IDS).logits.double() - exact).abs().max()
        theirs = (twin(IDS).logits.double() - exact).abs().max()
    # Not further from transformers' fp64 than its own in the same dtype; its fp64 rounds to fp32 in
    # the norms (2^-24 per value, some of them added up), which lmfast's does not.
    assert off <= 1.5 * theirs + 2e-6 * exact.abs().max()


def test_autocast() -> None:
    model = make("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits, _ = gradients(model)
        lmfast.patch(model)
        new_loss, new_logits, _ = gradients(model)
    # bf16 products: 2^-9 per factor, through two layers.
    assert_close(new_loss, loss, 1e-2)
    assert new_logits.dtype == logits.dtype
    assert_close(new_logits.float(), logits.float(), 3e-2)


def test_loss_options() -> None:
    model = make("llama")
    labels = IDS.clone()
    labels[0, 3:6] = -100
    cases: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 11},
        {"labels": labels, "num_items_in_batch": torch.tensor(13)},
        {"labels": labels, "shift_labels": labels.roll(1, 1)},
        {"labels": labels, "logits_to_keep": 9},
        {"labels": torch.full_like(labels, -100)},
    ]
    expected = [model(IDS, **case).loss for case in cases]
    lmfast.patch(model)
    for case, loss in zip(cases, expected, strict=True):
        torch.testing.assert_close(model(IDS, **case).loss, loss, equal_nan=True)
    with torch.no_grad():
        assert type(model(IDS, labels=IDS).logits) is Tensor
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    out = model(IDS, labels=IDS)
    assert type(out.logits) is Tensor
    torch.testing.assert_close(out.loss, out.logits.sum())


def test_lazy_logits_behave_as_logits() -> None:
    model = patched()
    out = model(IDS, labels=IDS)
    lazy = out.logits
    assert isinstance(lazy, LazyLogits)
    assert lazy._computed is None
    assert (lazy.shape, lazy.dtype, lazy.dim()) == ((2, 9, 96), torch.float32, 3)
    assert lazy._computed is None
    plain = model(IDS).logits
    torch.testing.assert_close(lazy[:, -1], plain[:, -1])
    assert torch.equal(lazy.argmax(-1), plain.argmax(-1))
    assert torch.equal(torch.stack([lazy, lazy])[1], lazy.compute())
    torch.testing.assert_close(lazy.detach().numpy(), plain.detach().numpy())
    torch.testing.assert_close(pickle.loads(pickle.dumps(lazy.detach())), plain.detach())
    assert "LazyLogits" not in repr(lazy)
    (lazy.sum() + out.loss).backward()
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    out = model(IDS)
    (out.logits.sum() + model.loss_function(out.logits, IDS, 96)).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, grad, rtol=1e-4, atol=1e-5)
    assert out.to_tuple()[0] is out.logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stablelm"])
def test_output_attentions_and_hidden_states(kind: str) -> None:
    """GPT-2 and StableLM do not tell their layers that weights are wanted."""
    model = make(kind, attn_implementation="eager")
    with torch.no_grad():
        before = model(IDS, output_attentions=True, output_hidden_states=True)
        lmfast.patch(model)
        after = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(after.attentions) == model.config.num_hidden_layers
    for a, b in zip(
        before.attentions + before.hidden_states,
        after.attentions + after.hidden_states,
        strict=True,
    ):
        assert_close(b, a)


def test_a_configuration_that_asks_for_attention_weights_can_be_saved(tmp_path: Any) -> None:
    model = make("gpt2", attn_implementation="eager")
    model.config.output_attentions = True
    assert "left as it is (eager): config.output_attentions" in str(lmfast.patch(model))
    assert len(model(IDS).attentions) == model.config.num_hidden_layers
    model.save_pretrained(tmp_path)


def test_gradient_checkpointing() -> None:
    model = patched()
    model.train()
    _, _, grads = gradients(model)
    grads = [g.clone() for g in grads if g is not None]
    model.gradient_checkpointing_enable()
    _, _, again = gradients(model)
    for a, b in zip(grads, again, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_and_pickles() -> None:
    model = make("gemma2", attn_implementation="eager")
    lmfast.patch(model)
    expected = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, expected)
        assert type(twin).__name__ == "Gemma2ForCausalLM"
        lmfast.unpatch(twin)
        assert type(twin) is transformers.Gemma2ForCausalLM
        assert twin.config._attn_implementation == "eager"


def test_saves_and_loads(tmp_path: Any) -> None:
    model = patched()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    with torch.no_grad():
        assert_close(model(IDS).logits, loaded(IDS).logits)


def test_a_version_not_known_to_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.16.2", "5.25.0", "6.0.0"):
        model = make("llama")
        # The module that lmfast sees: importing transformers may put another one in its place.
        monkeypatch.setattr(integration.transformers, "__version__", version)
        report = lmfast.patch(model)
        assert not report.replaced
        assert f"transformers {version} is not known to work" in str(report)
        assert type(model) is transformers.LlamaForCausalLM


def test_the_backend_reaches_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    expected = model(IDS).logits
    before = model.config._attn_implementation
    report = lmfast.patch(model, backend="torch")
    assert 'attn_implementation="lmfast_torch"' in str(report)
    own, backends = lmfast.ops.attention, []

    def attention(*args: Any, backend: Any, **kwargs: Any) -> Tensor:
        backends.append(backend)
        return own(*args, backend=backend, **kwargs)

    monkeypatch.setattr(lmfast.ops, "attention", attention)
    assert_close(model(IDS).logits, expected)
    assert backends == ["torch", "torch"]
    lmfast.patch(model)
    backends.clear()
    assert_close(model(IDS).logits, expected)
    assert backends == [None, None]
    assert model.config._attn_implementation == "lmfast"
    lmfast.unpatch(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["_cache", "_trainer", "transformers"])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"lmfast.integrations.{name}")
    assert doctest.testmod(module).failed == 0


def test_hooks_on_every_module_run_as_before() -> None:
    model = make("llama")
    calls: list[str] = []
    for name, m in model.named_modules():
        m.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(IDS, labels=IDS)
    before = calls.copy()
    calls.clear()
    lmfast.patch(model)
    assert not calls
    model(IDS, labels=IDS)
    assert calls == before


def test_classification() -> None:
    config = transformers.LlamaConfig(**ARCHITECTURES["llama"], num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    labels = torch.tensor([0, 2])
    expected = model(IDS, attention_mask=LEFT, labels=labels)
    assert 'attn_implementation="lmfast"' in str(lmfast.patch(model))
    got = model(IDS, attention_mask=LEFT, labels=labels)
    assert_close(got.logits, expected.logits)
    assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("kind", ["llama", "gptj", "bloom"])
def test_on_the_meta_device(kind: str) -> None:
    """Shapes without numbers, as tools that estimate memory ask for them."""
    model = make(kind, attn_implementation="eager")
    lmfast.patch(model)
    meta = copy.deepcopy(model).to("meta")
    ids = IDS.to("meta")
    out = meta(ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert out.logits.shape == model(IDS).logits.shape
    out.loss.backward()
    assert all(p.grad is not None for p in meta.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_padding_masks_within_vmap(kind: str) -> None:
    """Each element has a mask of its own, which nobody can look at; the models' own takes that."""
    model = make(kind, attn_implementation="eager")
    lmfast.patch(model)
    ids = torch.stack((IDS, IDS.flip(0)))
    masks = torch.ones_like(ids)
    masks[0, 0, -2:] = 0

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, use_cache=False).logits

    with torch.no_grad():
        for a, b in zip(torch.func.vmap(run)(ids, masks), map(run, ids, masks), strict=True):
            assert_close(b, a)


def test_continuous_batching_has_the_attention_of_before() -> None:
    """transformers takes a few implementations by name only."""
    from transformers import ContinuousBatchingConfig

    model = make("llama", attn_implementation="sdpa")
    options: dict[str, Any] = {
        "generation_config": transformers.GenerationConfig(max_new_tokens=3, do_sample=False),
        # Its own choice is most of the memory there is.
        "continuous_batching_config": ContinuousBatchingConfig(
            num_blocks=4, max_batch_tokens=32, use_async_batching=False
        ),
        "progress_bar": False,
    }
    before = model.generate_batch([IDS[0].tolist()], **options)
    lmfast.patch(model)
    after = model.generate_batch([IDS[0].tolist()], **options)
    texts = [[out.generated_tokens for out in found.values()] for found in (before, after)]
    assert texts[0] == texts[1]
    assert model.config._attn_implementation == "lmfast"
