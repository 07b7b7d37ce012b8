"""Generator: what it says of itself, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lmfast
from lmfast.generation import GenerationOptions, Generator
from lmfast.generation.stopping import StopOfRow
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel

V = 37


def decoder():
    return DecoderLanguageModel(V, 16, 4, 2, 0).double().eval()


def elman():
    return RecurrentLanguageModel(V, 16, 2, 0, cell="elman").double().eval()


def test_explain_says_what_runs_and_why(capsys):
    generator = Generator(elman())
    text = generator.explain()
    assert "the model's own modules: the model has torch.float64 parameters" in text
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_new_tokens": 9}, ValueError, "min_new_tokens must be at most max_new"),
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an integer, got 2.0"),
        ({"num_beams": 2, "do_sample": True}, ValueError, "num_beams must be 1 with do_sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "at most num_beams 2, got 3"),
        ({"num_return_sequences": 2}, ValueError, "greedy continuations are all the same"),
        ({"best_of": 2, "num_return_sequences": 3, "do_sample": True}, ValueError, "best_of must"),
        ({"early_stopping": "yes"}, ValueError, 'early_stopping must be True, False or "never"'),
        ({"context_policy": "wrap"}, ValueError, "context_policy must be one of error, slide"),
        ({"stop_strings": "x"}, ValueError, "tokenizer must be given with stop_strings"),
        ({"choices": []}, ValueError, "choices must hold at least one"),
        ({"choices": [[]]}, ValueError, "every choice must have at least one token"),
        ({"choices": [[99]]}, ValueError, r"choices must be in 0\.\.36, got \[99\]"),
        ({"choices": [[1, 2, 3, 4]]}, ValueError, "max_new_tokens must be at least 4, .* got 3"),
        ({"choices": [[1]], "min_new_tokens": 1}, ValueError, "min_new_tokens must be 0 with choi"),
        ({"stop_sequences": [3, 4]}, TypeError, "each of stop_sequences must be ids, got 3"),
        ({"stop_sequences": [[37]]}, ValueError, r"stop_sequences must be in 0\.\.36, got \[37\]"),
        ({"suppress_tokens": 4}, TypeError, "suppress_tokens must be ids, got 4"),
        ({"pad_token_id": 37}, ValueError, r"pad_token_id must be in 0\.\.36, got \[37\]"),
        ({"eos_token_id": 3.5}, TypeError, "eos_token_id must be ids, got 3.5"),
        ({"attention_mask": [[1] * 3] * 2}, TypeError, "attention_mask must be a tensor, got list"),
        ({"prefix": 3}, TypeError, "prefix must be what Generator.prefill returned, got 3"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got 3"),
        ({"top_k": 2.5, "do_sample": True}, ValueError, "or a whole number above, got 2.5"),
        ({"top_k": "5"}, TypeError, "top_k must be a number or a tensor of them, got '5'"),
        ({"logit_bias": {9: torch.nan}}, ValueError, "logit_bias must be finite, or -inf"),
        ({"logit_bias": {99: 1.0}}, ValueError, r"logit_bias must be in 0\.\.36"),
        ({"logit_bias": torch.zeros(3)}, ValueError, r"logit_bias must be \(37,\), got \(3,\)"),
        ({"typical_p": 0.0}, ValueError, r"typical_p must be in \(0, 1\], got 0.0"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature must .* \(2,\), got \(5,\)"),
        ({"eos_token_id": 99}, ValueError, r"eos_token_id must be in 0\.\.36"),
        ({"assistant_model": RecurrentLanguageModel(9, 8, 1, 0)}, ValueError, "vocabulary of 37"),
        ({"prompt_lookup_num_tokens": 3, "use_cache": False}, ValueError, "does not go with use_c"),
        ({"max_tokens": 3}, TypeError, "max_tokens"),
        ({"do_sample": "no"}, TypeError, "do_sample must be True or False, got 'no'"),
        ({"on_token": 3}, TypeError, "on_token must be a function, got 3"),
        ({"logit_bias": [1.0]}, TypeError, "logit_bias must be a mapping of ids or a tensor"),
        ({"length_penalty": "a"}, TypeError, "length_penalty must be a number, got 'a'"),
        ({"weights": 3}, ValueError, "weights must be one of fp32, bf16, int8, int4, got 3"),
    ],
)  # fmt: skip
def test_impossible_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        lmfast.generate(decoder(), torch.ones(2, 3, dtype=torch.int64), 3, **options)


def test_models_that_cannot_run_and_weights_that_cannot_be():
    with pytest.raises(TypeError, match="Linear has no vocab_size and no step and no new_state"):
        Generator(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weights must be one of fp32, bf16, int8, int4"):
        Generator(decoder(), weights="fp8")

    class Plain:
        vocab_size = 3
        step = new_state = None

    with pytest.raises(ValueError, match="weights must be 'fp32' for this model, got 'int8'"):
        Generator(Plain(), weights="int8")


def test_options_have_transformers_defaults():
    options = GenerationOptions(max_new_tokens=1)
    assert (options.top_k, options.temperature, options.do_sample) == (50, 1.0, False)
    assert (options.num_beams, options.length_penalty, options.early_stopping) == (1, 1.0, False)


@pytest.mark.parametrize("form", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_ids_come_in_any_sequence(form):
    model, ids = decoder(), torch.tensor([[3, 4], [5, 6]])
    free = lmfast.generate(model, ids, 8, eos_token_id=None)[:, 2:]
    end = int(free[0, 3])
    expected = lmfast.generate(model, ids, 8, eos_token_id=end, pad_token_id=1)
    assert not torch.equal(expected[:, 2:], free)
    for given in (form([end]), np.int64(end), torch.tensor(end)):
        found = lmfast.generate(model, ids, np.int64(8), eos_token_id=given, pad_token_id=1)
        assert torch.equal(found, expected)
    found = lmfast.generate(model, ids, 8, stop_sequences=[form([end])], pad_token_id=1)
    assert torch.equal(found, expected)
    assert end not in lmfast.generate(model, ids, 8, suppress_tokens=form([end]))[:, 2:]


def test_padding_of_a_config_outside_the_vocabulary_is_not_used():
    model = decoder()
    model.generation_config = SimpleNamespace(eos_token_id=None, pad_token_id=-1)
    ids = torch.tensor([[3, 4], [5, 6]])
    end = int(lmfast.generate(model, ids, 1)[0, 2])
    out = lmfast.generate(model, ids, 6, eos_token_id=end)
    assert (out[0, 3:] == model.pad_idx).all()


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("before", ["", "x" * 3, "x" * 20])
def test_stop_strings_of_any_length(length, before):
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    string = "abcdefgh"[:length]
    stop = StopOfRow([], [], [string], Letters())
    assert [stop.ends(ord(c)) for c in before + string] == [False] * len(before + string[1:]) + [
        True
    ]


def test_the_number_of_new_tokens_by_place_or_by_name():
    model, ids = decoder(), torch.tensor([[1, 2, 3]])
    generator, expected = Generator(model), lmfast.generate(model, ids, max_new_tokens=4)
    batch = generator.batch()
    key = batch.add(ids[0], 4)
    while batch.running:
        batch.step()
    assert batch.new_ids(key) == expected[0, 3:].tolist()
    for found in (
        lmfast.generate(model, ids, 4),
        generator.generate(ids, 4),
        generator.generate(ids, max_new_tokens=4),
        generator.complete(ids, 4).ids,
        torch.cat((ids, torch.stack([*generator.stream(ids, 4)], 1)), 1),
    ):
        assert torch.equal(found, expected)
    for call in (generator.generate, generator.complete, generator.stream):
        with pytest.raises(TypeError, match="max_new_tokens must be given"):
            call(ids)
    with pytest.raises(TypeError, match="max_new_tokens must be given"):
        lmfast.generate(model, ids)
    with pytest.raises(TypeError, match=r"temprature is no option.* did you mean temperature"):
        generator.generate(ids, 4, temprature=2.0)


def test_whole_numbers_of_other_kinds_are_whole_numbers():
    model, ids = decoder().float(), torch.tensor([[1, 2, 3]])
    expected = lmfast.generate(model, ids, 5)
    found = lmfast.generate(model, ids, np.int64(5), min_new_tokens=np.int32(2))
    assert torch.equal(found, expected)


def test_what_is_no_prefix_and_no_prompt_is_named():
    generator, ids = Generator(decoder()), torch.tensor([[1, 2]])
    for call in (lambda: generator.batch(3), lambda: generator.prefill(ids, prefix=3)):
        with pytest.raises(
            TypeError, match=r"prefix must be what Generator.prefill returned, got 3"
        ):
            call()
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1, got 0"):
        generator.prefill(ids, prefill_chunk_size=0)
    with pytest.raises(TypeError, match=r"ids must be int64 ids \(T,\), got 'abc'"):
        generator.batch().add("abc", 3)
