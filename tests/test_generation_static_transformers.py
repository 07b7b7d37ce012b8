"""Models of transformers on static buffers, run eagerly on the CPU, say what the loop says."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

transformers = pytest.importorskip("transformers")

from transformers_models import ARCHITECTURES, IDS, LEFT, assert_close, make  # noqa: E402

import lmfast  # noqa: E402
from lmfast.generation import Generator, static_step  # noqa: E402
from lmfast.generation.transformers import experts  # noqa: E402
from lmfast.generation.transformers import static as transformers_static  # noqa: E402
from lmfast.generation.transformers.runner import TransformersRunner  # noqa: E402

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


def _as_on_a_gpu() -> bool:
    """`torch.compiler.is_compiling`: this package looks at values on a CPU alone, unless it is."""
    return sys._getframe(1).f_globals["__name__"].startswith("lmfast.")


# Without experts: that their products wait for the host, tensors without values do not show.
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3"])
def test_a_step_looks_at_no_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that have no values: whatever would wait for a GPU raises."""
    model = make(kind)
    lmfast.patch(model)
    runner = TransformersRunner(model)
    with torch.no_grad():
        _, state = runner.step(IDS, runner.new_state(2))
        step = runner.static_model(state, 7)
        monkeypatch.setattr(torch.compiler, "is_compiling", _as_on_a_gpu)
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
    model._can_compile_fullgraph = True
    model.hf_device_map = {"": 0}
    assert transformers_static.why_not_static(model) is None
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    assert "several devices (hf_device_map)" in str(transformers_static.why_not_static(model))
    del model.hf_device_map
    model.lm_head.to("meta")
    assert "(cpu, meta)" in str(transformers_static.why_not_static(model))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe", "olmoe"])
def test_experts_are_known_and_convolutions_are_not(kind: str) -> None:
    model = make(kind)
    model.conv = torch.nn.Conv1d(4, 4, 3)
    named = {n: p for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3}
    assert {id(p) for p in experts.expert_parameters(model)} == set(map(id, named.values()))
    assert model.config.get_text_config()._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(
    ("implementation", "dtype", "capability", "waits"),
    [
        ("grouped_mm", torch.bfloat16, (9, 0), False),
        ("grouped_mm", torch.bfloat16, (10, 0), False),
        ("grouped_mm", torch.bfloat16, (8, 0), True),
        ("grouped_mm", torch.bfloat16, (12, 0), True),
        ("grouped_mm", torch.float16, (9, 0), True),
        ("batched_mm", torch.float16, (8, 0), False),
        ("eager", torch.bfloat16, (9, 0), True),
        (None, torch.bfloat16, (9, 0), True),
    ],
)
def test_where_experts_wait_for_the_host(
    implementation: str | None, dtype: torch.dtype, capability: tuple[int, int], waits: bool
) -> None:
    assert (experts.why_experts_wait(implementation, dtype, capability) is not None) == waits


@torch.inference_mode()
def test_keys_and_values_are_not_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TransformersRunner(make("llama"))
    _, state = runner.step(IDS, runner.new_state(2))
    old = state.cache.layers[0].keys.nbytes + state.cache.layers[0].values.nbytes
    # Ten columns become eighteen: of two layers, and one layer of the old ones besides.
    needed = 2 * old * 8 // IDS.shape[1] + old
    for free, fits in ((needed, True), (needed - 1, False), (None, True)):
        monkeypatch.setattr(transformers_static, "_free_bytes", lambda device, free=free: free)
        assert runner.may_be_static(state, 8) == fits
    runner.static_model(state, 8)
    assert all(layer.keys is None and layer.values is None for layer in state.cache.layers)


def test_this_package_with_a_backend_sees_all() -> None:
    model = make("llama")
    lmfast.patch(model)
    assert transformers_static._sees_all(model)
    for name, sees in (("lmfast_triton", True), ("sdpa", False)):
        model.config._attn_implementation_internal = name
        assert transformers_static._sees_all(model) == sees
