"""Models of transformers on static buffers, run eagerly on the CPU, say what the loop says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

transformers = pytest.importorskip("transformers")

from transformers_models import ARCHITECTURES, IDS, LEFT, assert_close, make  # noqa: E402

import lmfast  # noqa: E402
from lmfast.generation import Generator, static_step  # noqa: E402
from lmfast.integrations import transformers_static  # noqa: E402
from lmfast.integrations.transformers_runner import TransformersRunner  # noqa: E402

# Not in one graph, says transformers: states or experts of their own.
LOOPS = {k for k in ARCHITECTURES if transformers_static.why_not_static(make(k)) is not None}


def test_most_architectures_have_a_static_step() -> None:
    assert len(LOOPS) <= len(ARCHITECTURES) // 5, LOOPS


def logits_of(runner: Any, static: bool, ragged: bool) -> list[Tensor]:
    """After the prompts and after each of seven fixed ids."""
    ids, lengths = IDS, None
    if ragged:  # right padding, as prompts come to a runner
        lengths = LEFT.sum(1)
        ids = torch.stack([row.roll(int(n) - len(row)) for row, n in zip(IDS, lengths)])
    logits, state = runner.step(ids, runner.new_state(2), lengths)
    found = [logits]
    model = runner.static_model(state, 7) if static else None
    for step in range(7):
        new = torch.tensor([3 + step, 90 - step])
        if model is not None:
            logits = model(new)
        else:
            logits, state = runner.step(new[:, None], state)
        found.append(logits)
    return found


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", sorted(set(ARCHITECTURES) - LOOPS))
@torch.inference_mode()
def test_the_logits_of_the_loop(kind: str, patched: bool) -> None:
    model = make(kind)
    if patched:
        lmfast.patch(model)
    runner = TransformersRunner(model)
    for ragged in (False, True):
        pairs = zip(logits_of(runner, True, ragged), logits_of(runner, False, ragged), strict=True)
        for got, expected in pairs:
            assert_close(got, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_a_step_looks_at_no_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that have no values: whatever would wait for a GPU raises."""
    model = make(kind)
    lmfast.patch(model)
    runner = TransformersRunner(model)
    with torch.no_grad():
        _, state = runner.step(IDS, runner.new_state(2))
        step = runner.static_model(state, 7)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU, unchecked
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert step(torch.tensor([3, 4])).shape == (2, 96)


@torch.inference_mode()
def test_attention_reads_the_length_and_not_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched, rows of one length: no mask over the room of a static cache."""
    seen: list[int] = []
    attend = lmfast.ops.cached_attention
    monkeypatch.setattr(
        lmfast.ops,
        "cached_attention",
        lambda q, k, v, ends, **o: (seen.append(int(ends[0])), attend(q, k, v, ends, **o))[1],
    )
    model = make("llama")
    lmfast.patch(model)
    logits_of(TransformersRunner(model), True, False)
    assert seen == [n for n in range(10, 17) for _ in range(2)]


def test_generate_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole generation with draws, ends and rows of different length."""
    unsupported, taken = static_step.unsupported, []
    steps = static_step._steps
    monkeypatch.setattr(static_step, "unsupported", lambda job: unsupported(job, on_cpu=True))
    monkeypatch.setattr(static_step, "_steps", lambda *a: (taken.append(1), steps(*a))[1])
    results = []
    for static in (True, False):
        if not static:
            monkeypatch.setattr(static_step, "unsupported", lambda job: "not now")
        generator = Generator(make("llama"))
        generator.runner = TransformersRunner(make("llama"))
        options: dict[str, Any] = {
            "do_sample": True,
            "generator": torch.Generator().manual_seed(3),
            "max_new_tokens": 20,
            "eos_token_id": [1, 2, 3],
        }
        results.append(generator.generate(IDS, attention_mask=LEFT, **options))
    assert taken == [1]
    assert torch.equal(results[0][:, : results[1].shape[1]], results[1])


def test_says_why_not() -> None:
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    reason = transformers_static.why_not_static(make("llama", rope_parameters=rotation))
    assert reason == "the rotation (dynamic) depends on the length of the text"
    model = make("llama")
    assert transformers_static.why_not_static(model) is None
    model._can_compile_fullgraph = False
    assert "one graph" in str(transformers_static.why_not_static(model))
