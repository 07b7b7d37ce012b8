"""`lmfast.generate` packs a model once, and anew when it changed."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import pytest
import torch
from test_engine import OPTIONS, V, ids_of, model_of

import lmfast
from lmfast.generation import generator as module
from lmfast.generation import quantise
from lmfast.models import RecurrentLanguageModel

pytestmark = pytest.mark.usefixtures("needs_cpu_kernels")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights of every `Generator` that is made."""
    found: list[str] = []

    class Counted(module.Generator):
        def __init__(self, model, **options) -> None:
            super().__init__(model, **options)
            found.append(self.weights)

    monkeypatch.setattr(module, "Generator", Counted)
    return found


def greedy(model, **options) -> torch.Tensor:
    return lmfast.generate(model, ids_of(1, 6), 5, **options)


def test_packed_once(made: list[str]) -> None:
    model = model_of(OPTIONS["llama"])
    first = greedy(model)
    assert torch.equal(greedy(model), first)
    greedy(model, do_sample=True)
    assert made == ["fp32"]
    greedy(model, weights="int4")
    greedy(model, weights="int4", group=64)
    greedy(model, weights="int4", group=64)
    assert made == ["fp32", "int4", "int4"]
    weights = quantise(model, "int8")
    greedy(model, weights=weights)
    greedy(model, weights=weights)
    assert made == ["fp32", "int4", "int4", "int8"]
    greedy(model, weights=quantise(model, "int8"))
    assert len(made) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layers[0].attn.W_O.mul_(2),
        lambda m: m.layers[1].mlp.W_D.data.mul_(-1),
        lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
        lambda m: setattr(m, "logit_softcap", 3.0),
        lambda m: setattr(m.layers[0].norm1, "eps", 0.5),
        lambda m: setattr(m.layers[0].attn, "W_O", torch.nn.Parameter(m.layers[0].attn.W_O * 3)),
    ],
    ids=["in place", "data", "load", "setting", "setting of a layer", "another"],
)
def test_changes_are_noticed(change, made: list[str]) -> None:
    model = model_of(OPTIONS["llama"])
    greedy(model)
    with torch.no_grad():
        change(model)
    found = lmfast.generate(model, ids_of(1, 6), 12)
    assert len(made) == 2
    assert torch.equal(found, lmfast.Generator(model).generate(ids_of(1, 6), max_new_tokens=12))


def test_changes_of_inference_tensors_are_noticed(made: list[str]) -> None:
    with torch.inference_mode():
        model = model_of(OPTIONS["llama"])
        greedy(model)
        greedy(model)
        assert len(made) == 1
        model.layers[0].attn.W_O.mul_(2)
        greedy(model)
    assert len(made) == 2


def test_the_model_may_go() -> None:
    model = model_of(OPTIONS["llama"])
    greedy(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_training_mode_with_dropout_is_not_packed(made: list[str]) -> None:
    model = RecurrentLanguageModel(101, 16, 2, 0, cell="gru", dropout=0.5).train()
    greedy(model)
    greedy(model)
    assert len(made) == 2  # its own modules, which need no packing


@pytest.mark.parametrize("shared", [False, True], ids=["lmfast.generate", "one Generator"])
def test_threads_get_what_one_gets(shared: bool) -> None:
    model = model_of(OPTIONS["llama"])
    prompts = [ids_of(1, 4 + i, i) for i in range(6)]
    lengths = [20 + 15 * i for i in range(6)]
    expected = [lmfast.generate(model, p, n) for p, n in zip(prompts, lengths, strict=True)]
    found: list[torch.Tensor | None] = [None] * 6
    fresh = model_of(OPTIONS["llama"])
    generate = functools.partial(lmfast.generate, fresh)
    if shared:  # and its model is gone
        generate = lmfast.Generator(fresh).generate
        del fresh

    def run(i: int) -> None:
        found[i] = generate(prompts[i], max_new_tokens=lengths[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_engine_is_left_where_another_backend_is_asked_for() -> None:
    """It is C++ of many operators at once: asked for torch, it would run all the same."""
    model, ids = model_of({}), ids_of(1, 5)
    for generate in (lmfast.Generator(model).generate, functools.partial(lmfast.generate, model)):
        before = generate(ids, max_new_tokens=6)
        with lmfast.use_backend("torch"):
            generator = lmfast.Generator(model)
            assert "ask for torch, and the engine is C++" in generator.explain()
            assert torch.equal(generator.generate(ids, max_new_tokens=6), before)
            assert torch.equal(lmfast.generate(model, ids, max_new_tokens=6), before)
            with pytest.raises(ValueError, match=r"weights must be 'fp32'.*ask for torch"):
                lmfast.Generator(model, weights="int8")
        assert torch.equal(generate(ids, max_new_tokens=6), before)
    for request in ("cpu", "rms_norm=torch"):
        with lmfast.use_backend(request):
            assert "the compiled engine" in lmfast.Generator(model).explain()


@pytest.mark.parametrize("place", ["embedding", "layers.1.attn", "layers.0.mlp", "layers.0.norm1"])
def test_hooks_are_called(place: str) -> None:
    """On a model that was packed already, and no more once they are removed."""
    model, prompt = model_of(OPTIONS["llama"]), ids_of(2, 6)
    before = lmfast.generate(model, prompt, 8)
    hook = model.get_submodule(place).register_forward_hook(lambda m, args, out: out.flip(-1))
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            last = model(expected)[:, -1:].argmax(-1)
            expected = torch.cat((expected, last), 1)
    assert not torch.equal(expected, before)
    assert torch.equal(lmfast.generate(model, prompt, 8), expected)
    assert "forward hooks" in lmfast.Generator(model).explain()
    hook.remove()
    assert torch.equal(lmfast.generate(model, prompt, 8), before)


def test_hooks_of_an_output_layer_are_called() -> None:
    model, prompt = RecurrentLanguageModel(V, 16, 2, 0, cell="gru"), ids_of(2, 6)
    before = lmfast.generate(model, prompt, 8)
    hook = model.fc.register_forward_hook(lambda m, args, out: out.flip(-1))
    last = model(prompt)[:, -1].argmax(-1)
    found = lmfast.generate(model, prompt, 8)
    assert torch.equal(found[:, 6], last)
    assert not torch.equal(found, before)
    assert "are not called" not in lmfast.Generator(model).explain()
    hook.remove()
    assert torch.equal(lmfast.generate(model, prompt, 8), before)


@pytest.mark.parametrize("tied", [False, True])
def test_hooks_that_are_not_called_are_named(tied: bool) -> None:
    model = RecurrentLanguageModel(V, 16, 2, 0, tie_weights=tied)
    assert "are not called" not in lmfast.Generator(model).explain()
    (model.fc if tied else model).register_forward_hook(lambda *_: 1 / 0)
    lmfast.generate(model, ids_of(2, 6), 3)
    place = "'fc'" if tied else "the model itself"
    assert f"the hooks of {place}" in lmfast.Generator(model).explain()
