"""Generator over models of Hugging Face transformers: what their own generate gives."""

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from lmfast.generation import Generator  # noqa: E402

V = 61


def make(kind):
    torch.manual_seed(0)
    # Large weights make choices clear-cut.
    common = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.4}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4, **common)
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 256}  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, **common)
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.MistralConfig(sliding_window=8, **sizes, **common)
    return transformers.MistralForCausalLM(config).eval()


every = pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])


def batch():
    """Left-padded ids and mask, and the same right-padded."""
    ids = torch.randint(3, V, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :10], mask[1, :15] = 0, 0
    # A token of the prompt: older transformers count padding among what is repeated.
    ids = torch.where(mask.bool(), ids, ids[:, -1:])
    right, right_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, n in enumerate((10, 5, 20)):
        right[row, :n], right_mask[row, :n] = ids[row, 20 - n :], 1
    return (ids, mask), (right, right_mask)


def theirs(model, ids, mask, **options):
    with torch.inference_mode():
        return model.generate(ids, attention_mask=mask, pad_token_id=1, do_sample=False, **options)


@every
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 60, "eos_token_id": None},
        {"max_new_tokens": 30, "eos_token_id": [2, 5, 7], "min_new_tokens": 4},
        {"max_new_tokens": 30, "repetition_penalty": 1.7},
        {"max_new_tokens": 20, "suppress_tokens": [4, 8, 13]},
    ],
    ids=["plain", "ends", "penalty", "suppressed"],
)
def test_greedy_equals_theirs(kind, options):
    model = make(kind)
    left, right = batch()
    expected = theirs(model, *left, **options)
    for ids, mask in (left, right):
        for extra in ({}, {"prefill_chunk_size": 6}, {"prompt_lookup_num_tokens": 4}):
            out = Generator(model).generate(
                ids, attention_mask=mask, pad_token_id=1, **options, **extra
            )
            assert torch.equal(out[:, 20:], expected[:, 20:])


@every
def test_drafts_and_no_cache_change_nothing(kind):
    model = make(kind)
    (ids, mask), _ = batch()
    options = {"attention_mask": mask, "max_new_tokens": 25, "eos_token_id": None}
    expected = Generator(model).generate(ids, **options)
    for extra in (
        {"use_cache": False},
        {"assistant_model": model},
        {"assistant_model": make("llama"), "num_assistant_tokens": 3},
    ):
        assert torch.equal(Generator(model).generate(ids, **options, **extra), expected)


@every
def test_beam_search_equals_theirs(kind):
    model = make(kind)
    (ids, mask), _ = batch()
    generator = Generator(model)
    for beams, penalty, early, eos in itertools.product(
        (2, 4), (1.0, 0.0, -1.0), (True, False, "never"), ([2, 5, 7, 9], None)
    ):
        options = {"max_new_tokens": 10, "num_beams": beams, "length_penalty": penalty,
                   "early_stopping": early, "eos_token_id": eos,
                   "num_return_sequences": 2}  # fmt: skip
        out = generator.generate(ids, attention_mask=mask, pad_token_id=1, **options)
        assert torch.equal(out, theirs(model, ids, mask, **options)), options
    for more in (
        {"repetition_penalty": 1.5, "min_new_tokens": 5},
        {"suppress_tokens": [4, 8]},
    ):
        options = {"max_new_tokens": 12, "num_beams": 3, "eos_token_id": [2, 5, 7, 9], **more}
        out = generator.generate(ids, attention_mask=mask, pad_token_id=1, **options)
        assert torch.equal(out, theirs(model, ids, mask, **options)), options


def test_scores_of_beam_search_equal_theirs():
    model = make("llama")
    (ids, mask), _ = batch()
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3,
               "eos_token_id": [2, 5, 7, 9]}  # fmt: skip
    found = Generator(model).complete(ids, attention_mask=mask, pad_token_id=1, **options)
    expected = theirs(model, ids, mask, return_dict_in_generate=True, output_scores=True, **options)
    torch.testing.assert_close(found.scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


def test_prefixes_and_sliding_contexts():
    model = make("gpt2")
    generator = Generator(model)
    ids = torch.randint(3, V, (2, 40))
    ids[:, :34] = ids[:1, :34]
    expected = theirs(model, ids, torch.ones_like(ids), max_new_tokens=9, eos_token_id=None)
    options = {"max_new_tokens": 9, "eos_token_id": None}
    assert torch.equal(generator.generate(ids, **options), expected)
    prefix = generator.prefill(ids[:1, :34])
    assert torch.equal(generator.generate(ids, prefix=prefix, **options), expected)
    with pytest.raises(ValueError, match="do not fit into a context of 128 tokens"):
        generator.generate(ids, max_new_tokens=90, eos_token_id=None)
    out = generator.generate(ids[:1], max_new_tokens=120, eos_token_id=None, context_policy="slide")
    text = context = ids[:1]
    for _ in range(120):
        with torch.inference_mode():
            new = model(context).logits[:, -1:].argmax(-1)
        text, context = torch.cat((text, new), 1), torch.cat((context, new), 1)
        context = context if context.shape[1] <= 128 else context[:, -64:]
    assert torch.equal(out, text)


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        Generator(transformers.T5ForConditionalGeneration(config))


def test_a_model_whose_positions_begin_elsewhere_gets_those_of_transformers():
    """RoBERTa's begin behind its padding id, unless they are given, as generate gives them."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, is_decoder=True, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.RobertaForCausalLM(config).eval()
    (ids, mask), _ = batch()
    expected = theirs(model, ids, mask, max_new_tokens=10, eos_token_id=None)
    generator = Generator(model)
    options = {"max_new_tokens": 10, "eos_token_id": None}
    assert torch.equal(generator.generate(ids, attention_mask=mask, **options), expected)
    assert torch.equal(generator.generate(ids[1:2, 15:], **options)[0], expected[1, 15:])


def test_models_that_keep_something_else_than_keys_and_values_are_named():
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Lfm2Config(
        **sizes, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    with pytest.raises(TypeError, match="has layers of types conv: use its own generate"):
        Generator(transformers.Lfm2ForCausalLM(config))
    config = transformers.OpenAIGPTConfig(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4
    )
    model, ids = transformers.OpenAIGPTLMHeadModel(config).eval(), torch.tensor([[3, 4, 5]])
    with pytest.raises(ValueError, match=r"does not keep keys and values .* set use_cache=False"):
        Generator(model).generate(ids, 4)
    expected = theirs(model, ids, None, max_new_tokens=4)
    assert torch.equal(Generator(model).generate(ids, 4, use_cache=False), expected)
