"""The engine on transformers' models: the same logits, and the same tokens greedily."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import lmfast
from lmfast.generation.engine import CannotPack, EngineRunner, make_engine
from lmfast.generation.engine.make import plan_of
from lmfast.generation.engine.plan import Linear, Plan
from lmfast.generation.engine.plan_forward import PlanForward

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("needs_cpu_kernels")

V = 131


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The operators of models this small are faster alone, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


COMMON = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"activation_function": "gelu_new"}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5, "hidden_act": "gelu"}),
    "gpt-neox sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "llama": ("Llama", {"attention_bias": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 11, "head_dim": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**SLIDING, "head_dim": 16, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3Text", {**SLIDING, "head_dim": 16, "query_pre_attn_scalar": 20}),
    "phi3": ("Phi3", {"sliding_window": 40}),
    "olmo2": ("Olmo2", {}),
}


def model_of(name: str, **more: Any) -> Any:
    torch.manual_seed(3)
    family, options = MODELS[name]
    options = {**COMMON, **options, **more}
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"][: options["num_hidden_layers"]]
    config = getattr(transformers, f"{family}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():  # far enough from zero for the greedy choice to be clear
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_tokens(name: str) -> None:
    """Greedily over 256 tokens; the error against float64 at most 1.5 times theirs.

    The largest of 67,000 errors is an extreme, which differs by 1.8 between equally exact sums.
    """
    model = model_of(name)
    runner = make_engine(model)
    ids = torch.randint(3, V, (2, 7))
    new = 256
    expected = model.generate(
        ids,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    state, now, found = runner.new_state(2), ids, []
    for _ in range(new):
        logits, state = runner.step(now, state)
        found.append(logits)
        now = logits.argmax(-1)[:, None]
    ours, theirs = torch.stack(found, 1), torch.stack(expected.logits, 1)
    assert torch.equal(ours.argmax(-1), expected.sequences[:, 7:])
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(expected.sequences[:, :-1]).logits[:, 6:]
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    errors = [(logits - exact).abs() for logits in (ours, theirs)]
    assert errors[0].square().mean().sqrt() <= 1.5 * errors[1].square().mean().sqrt() + ulp
    assert errors[0].max() <= 2.5 * errors[1].max() + ulp


def upto(plan: Plan, count: int) -> Plan:
    """The model's first layers, whose logits are what comes out of them: E numbers, then zeros."""
    table = plan.head.weight if plan.embedding is None else plan.embedding
    return replace(
        plan,
        layers=plan.layers[:count],
        ropes=plan.ropes[:count],  # numbered as layers first need them
        embedding=table,
        final_norm=plan.final_norm if count == len(plan.layers) else None,
        head=Linear(torch.eye(plan.vocab, plan.width)),
        logit_softcap=None,
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_gives_what_theirs_gives(name: str) -> None:
    """Of a prompt and of the tokens after it; errors against float64 as above, layer by layer.

    The product with the identity that stands in the place of the output layer is exact.
    """
    model = model_of(name)
    ids = torch.randint(3, V, (2, 40))
    with torch.no_grad():
        theirs = model(ids, output_hidden_states=True).hidden_states
        exact = copy.deepcopy(model).double()(ids, output_hidden_states=True).hidden_states
    plan = plan_of(model)
    assert len(theirs) == len(plan.layers) + 1 == 4
    for count in range(1, len(theirs)):
        runner = EngineRunner(lambda count=count: upto(plan, count), "fp32")
        prompt, state = runner.step(ids[:, :33], runner.new_state(2), all_positions=True)
        after = [runner.step(ids[:, t : t + 1], state)[0] for t in range(33, 40)]
        whole = torch.cat([prompt, torch.stack(after, 1)], 1)
        assert not whole[..., plan.width :].any()
        ours = whole[..., : plan.width]
        ulp = torch.finfo(torch.float32).eps * exact[count].abs().max()
        errors = [(t - exact[count]).abs() for t in (ours, theirs[count])]
        root = [e.square().mean().sqrt() for e in errors]
        assert root[0] <= 1.5 * root[1] + ulp, f"after layer {count}"
        assert errors[0].max() <= 2.5 * errors[1].max() + ulp, f"after layer {count}"


@pytest.mark.parametrize("name", MODELS)
def test_what_calibration_sees_is_the_model(name: str) -> None:
    model = model_of(name)
    texts = torch.randint(3, V, (2, 33))
    with torch.no_grad():
        expected = model(texts).logits.flatten(0, 1)
        found = PlanForward(plan_of(model), list(texts)).logits()
    # 3 layers of float32 on both sides, as in PyTorch's own products.
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3"])
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_narrow_weights(name: str, weights: str) -> None:
    model = model_of(name)
    ids = torch.randint(3, V, (3, 21))
    with torch.no_grad():
        expected = model(ids).logits
    runner = make_engine(model, weights)
    found, _ = runner.step(ids, runner.new_state(3), all_positions=True)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < {"bf16": 0.02, "int8": 0.05, "int4": 0.35}[weights]


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_integers(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(3, V, (3, 21))
    weights = lmfast.quantise(model, "int8", texts=[torch.randint(3, V, (4, 50))])
    with torch.no_grad():
        expected = model(ids).logits
    runner = make_engine(model, weights)
    found, _ = runner.step(ids, runner.new_state(3), all_positions=True)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < 0.05  # as rounded to nearest, above


def test_bfloat16_models_keep_their_numbers() -> None:
    model = model_of("llama").bfloat16()
    ids = torch.randint(3, V, (1, 12))
    runner = make_engine(model, "bf16", cache_dtype=torch.float32)
    found, _ = runner.step(ids, runner.new_state(1))
    with torch.no_grad():
        exact = model.float()(ids).logits[:, -1]
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()


def test_what_cannot_be_packed_says_why() -> None:
    with pytest.raises(CannotPack, match=r"float16 parameters"):
        make_engine(model_of("llama").half())
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(CannotPack, match=r"a Sequential in the place of a plain linear layer"):
        make_engine(model)
    unknown = model_of("llama", hidden_act="mish")
    with pytest.raises(CannotPack, match=r"activation is 'mish'"):
        make_engine(unknown)
    with pytest.raises(CannotPack, match=r"training mode and has dropout"):
        make_engine(model_of("gpt2").train())


def test_positions_end() -> None:
    runner = make_engine(model_of("gpt2"))
    with pytest.raises(ValueError, match=r"has 512 positions, a row would have 513 tokens"):
        runner.step(torch.ones(1, 513, dtype=torch.int64), runner.new_state(1))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_patched_models_are_packed_as_they_were(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(3, V, (2, 7))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert lmfast.patch(model).replaced
    generator = lmfast.Generator(model)
    assert "the compiled engine" in generator.explain()
    assert torch.equal(generator.generate(ids, max_new_tokens=12, eos_token_id=None), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "eos_token_id": [5, 9, 70, 80], "repetition_penalty": 1.3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": False, "min_new_tokens": 6, "suppress_tokens": [7]},
    ],
    ids=["greedy", "ends", "beams", "least"],
)
def test_inside_their_generate(options: dict[str, Any]) -> None:
    model = model_of("llama")
    ids = torch.randint(3, V, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 1, **options}
    expected = model.generate(ids, **options)
    found = model.generate(ids, custom_generate=lmfast.generate, **options)
    assert torch.equal(found, expected)


def test_draws_inside_their_generate_and_what_is_refused() -> None:
    model = model_of("llama")
    ids = torch.randint(3, V, (1, 7))
    options = {"custom_generate": lmfast.generate, "max_new_tokens": 4, "eos_token_id": None}
    drawn = model.generate(ids, do_sample=True, num_return_sequences=40, **options)
    assert drawn.shape == (40, 11)
    assert len(drawn[:, 7].unique()) > 3
    one = model.generate(ids, do_sample=True, num_return_sequences=40, top_k=1, **options)
    greedy = model.generate(ids, do_sample=False, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(one, greedy.expand(40, -1))
    with pytest.raises(ValueError, match="has a NoRepeatNGramLogitsProcessor"):
        model.generate(ids, no_repeat_ngram_size=2, **options)
    with pytest.raises(ValueError, match="return_dict_in_generate must be False"):
        model.generate(ids, return_dict_in_generate=True, **options)
    with pytest.raises(ValueError, match="position_ids must count the tokens"):
        model.generate(ids, position_ids=torch.arange(7)[None] + 3, **options)
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="must be empty: use"):
        model.generate(ids, past_key_values=cache, **options)
    # Arguments of ours go through.
    int8 = lmfast.generate(model, ids, 4, weights="int8", eos_token_id=None)
    got = model.generate(ids, do_sample=False, weights="int8", **options)
    assert torch.equal(got, int8)
