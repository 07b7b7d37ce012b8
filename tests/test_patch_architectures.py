"""`lmfast.patch` on every decoder architecture of transformers, before and after.

Values, gradients, generation with every cache, training, torch.compile.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lmfast

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers.logging.set_verbosity_error()

from transformers_models import (  # noqa: E402
    ARCHITECTURES,
    CACHES,
    HEAD,
    IDS,
    LEFT,
    SEARCHES,
    TABLE,
    assert_close,
    gradients,
    make,
    row,
)

from lmfast.integrations.transformers import LazyLogits  # noqa: E402

# The table holds for the version it was made with; others name implementations differently.
THIS_VERSION = f"transformers\n{transformers.__version__}; " in TABLE.read_text()


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
    if THIS_VERSION:
        assert row(kind, report) in TABLE.read_text(), "python tests/transformers_models.py"
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
    for cache, arguments in CACHES.items():
        if kind == "mpt" and cache.startswith("lmfast"):
            continue  # transformers feeds it everything again beside a cache that it is given
        got = model.generate(
            IDS, attention_mask=LEFT, max_new_tokens=6, do_sample=False, **arguments(model)
        )
        assert torch.equal(got, tokens), f"other tokens with the cache {cache!r}"

    lmfast.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == before


def test_the_table_lists_exactly_the_architectures_tested() -> None:
    text = TABLE.read_text()
    assert text.startswith(HEAD) or not THIS_VERSION
    assert [line.split(" | ")[0][2:] for line in text.splitlines()[-len(ARCHITECTURES) :]] == list(
        ARCHITECTURES
    )


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "deepseek_v3"])
def test_searches_find_the_same_with_every_cache(kind: str, cache: str, search: str) -> None:
    model = make(kind)
    options = {"max_new_tokens": 7, "do_sample": False, **SEARCHES[search]}
    torch.manual_seed(1)
    expected = model.generate(IDS, attention_mask=LEFT, **options)
    lmfast.patch(model)
    torch.manual_seed(1)
    got = model.generate(IDS, attention_mask=LEFT, **CACHES[cache](model), **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_training_for_some_steps(kind: str) -> None:
    losses = [losses_of_training(kind, patch) for patch in (False, True)]
    assert losses[0][-1] < 0.7 * losses[0][0]
    # AdamW divides small gradients by themselves, so rounding grows over steps.
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def losses_of_training(kind: str, patch: bool) -> list[float]:
    model = make(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if patch:
        lmfast.patch(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    # What follows the padding is predicted from a row that sees nothing, and that each
    # implementation of attention fills as it likes.
    labels = IDS.masked_fill(LEFT == 0, -100)
    labels[1, 4] = -100
    losses = []
    for _ in range(20):
        loss = model(IDS, attention_mask=LEFT, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Dynamo walks the code of an architecture: all of them. What AOTAutograd does with a graph depends
# on the operators in it, and takes a third of the time: one architecture for each set of them.
THROUGH_AOT = ("bloom", "cohere", "codegen", "deepseek_v3", "falcon", "gemma2", "gpt2", "gpt_oss")
THROUGH_AOT += ("llama", "mpt", "phi3", "qwen2_moe", "stablelm")


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_compiles(kind: str) -> None:
    torch.compiler.reset()
    model = make(kind)
    with torch.no_grad():
        logits = model(IDS).logits
        lmfast.patch(model)
        backend = "aot_eager" if kind in THROUGH_AOT else "eager"
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert_close(compiled(IDS).logits, logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiles_a_training_step(kind: str) -> None:
    model = make(kind)
    loss, _, _ = gradients(model)
    lmfast.patch(model)
    # gpt2's loss logs a warning, which transformers' own does not compile either.
    options: dict[str, Any] = {"fullgraph": kind != "gpt2"}
    out = torch.compile(model, backend="aot_eager", **options)(IDS, labels=IDS)
    assert_close(out.loss, loss)
    out.loss.backward()
