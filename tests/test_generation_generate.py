"""generate: equal with and without cache, batches, padding, stops, sampling, errors."""

import pytest
import torch

from lmfast import ops
from lmfast.generation import Generator, generate, sampling_probabilities
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel
from lmfast.models.textbook import TextbookDecoder, TextbookRecurrent, textbook_generate

V = 37


def make(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "decoder":
        model = DecoderLanguageModel(V, 16, 4, 2, 0, num_kv_heads=2, final_norm=True)
    else:
        model = RecurrentLanguageModel(V, 16, 2, 0)
    # Weights as they are drawn give nearly equal logits; larger ones make choices clear-cut.
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    return model.double().eval()


both = pytest.mark.parametrize("kind", ["decoder", "recurrent"])


def greedy_by_hand(model, ids, count):
    """The definition: whole text through the model, likeliest token, append."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    return ids


@both
def test_greedy_equals_the_definition_with_and_without_cache(kind):
    model = make(kind)
    ids = torch.randint(1, V, (3, 5))
    expected = greedy_by_hand(model, ids, 90)  # past the cache's first capacity
    assert len(expected[:, 5:].unique()) > 3
    assert torch.equal(generate(model, ids, 90), expected)
    assert torch.equal(generate(model, ids, 20, use_cache=False), expected[:, :25])


@both
def test_greedy_equals_the_textbook(kind):
    torch.manual_seed(1)
    if kind == "decoder":
        ours, textbook = DecoderLanguageModel(V, 16, 4, 2, 0), TextbookDecoder(V, 16, 4, 2, 0)
    else:
        ours, textbook = RecurrentLanguageModel(V, 16, 2, 0), TextbookRecurrent(V, 16, 2, 0)
    textbook.load_state_dict(ours.state_dict())
    ids = torch.randint(1, V, (2, 4))
    expected = textbook_generate(textbook.double(), ids, 30)
    assert torch.equal(generate(ours.double(), ids, 30), expected)


@both
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_batch_equals_single_prompts(kind, side, use_cache):
    model = make(kind)
    prompts = [[5, 6, 7, 8, 9], [3], [11, 12, 13]]
    ids, mask = torch.full((3, 5), 2), torch.zeros(3, 5)
    for row, prompt in enumerate(prompts):
        where = slice(5 - len(prompt), 5) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    out = generate(model, ids, 12, attention_mask=mask, use_cache=use_cache)
    assert torch.equal(out[:, :5], ids)
    for row, prompt in enumerate(prompts):
        alone = greedy_by_hand(model, torch.tensor([prompt]), 12)
        assert torch.equal(out[row, 5:], alone[0, len(prompt) :])


@both
def test_rows_end_by_themselves_at_eos(kind):
    model = make(kind)
    ids = torch.randint(1, V, (4, 3))
    free = greedy_by_hand(model, ids, 30)[:, 3:]
    eos = free[0, 4].item()
    out = generate(model, ids, 30, eos_token_id=[eos], pad_token_id=36)[:, 3:]
    ends = []
    for row in range(4):
        hits = (free[row] == eos).nonzero().flatten().tolist()
        end = hits[0] + 1 if hits else 30
        ends.append(end)
        assert torch.equal(out[row, :end], free[row, :end])
        assert (out[row, end:] == 36).all()
    assert out.shape[1] == max(ends)
    assert min(ends) < 30


def test_min_new_tokens_delays_the_end():
    model = make("decoder")
    ids = torch.randint(1, V, (1, 3))
    free = greedy_by_hand(model, ids, 20)[0, 3:].tolist()
    first = free.index(free[2])
    out = generate(model, ids, 20, eos_token_id=free[2], min_new_tokens=10)[0, 3:].tolist()
    assert out[:first] == free[:first]
    assert len(out) >= 10
    assert free[2] not in out[:10]
    assert free[2] not in out[:-1]
    stop = [free[0:1]]
    assert len(generate(model, ids, 20, stop_sequences=stop, min_new_tokens=10)[0, 3:]) >= 10


def test_stop_sequences_end_a_row_after_the_whole_run():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 3))
    free = greedy_by_hand(model, ids, 20)[:, 3:]
    stop = free[0, 5:8].tolist()
    out = generate(model, ids, 20, stop_sequences=[stop], pad_token_id=0)[:, 3:]
    first = next(i for i in range(18) if free[0, i : i + 3].tolist() == stop)
    assert torch.equal(out[0, : first + 3], free[0, : first + 3])
    assert (out[0, first + 3 :] == 0).all()


def test_eos_comes_from_the_models_generation_config():
    model = make("decoder")
    ids = torch.randint(1, V, (1, 3))
    free = greedy_by_hand(model, ids, 10)[0, 3:].tolist()

    class Config:
        eos_token_id = free[4]

    model.generation_config = Config()
    end = free.index(free[4]) + 1
    assert generate(model, ids, 10)[0, 3:].tolist() == free[:end]
    assert generate(model, ids, 10, eos_token_id=None)[0, 3:].tolist() == free


def test_suppressed_tokens_never_appear():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 3))
    common = generate(model, ids, 15)[:, 3:].flatten().mode().values.item()
    out = generate(model, ids, 15, suppress_tokens=[common])
    assert (out[:, 3:] != common).all()


def test_repetition_penalty_acts_on_the_greedy_choice():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 3))
    out = generate(model, ids, 30, presence_penalty=1e6)[:, 3:]
    assert all(len(row.unique()) == 30 for row in out)


def test_sampling_is_reproducible_and_stays_in_the_top_k():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 3))
    options = {"do_sample": True, "top_k": 3, "temperature": 3.0}
    first, second, other = (
        generate(model, ids, 25, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    for end in range(3, 28):
        p = sampling_probabilities(model(first[:, :end])[:, -1], top_k=3)
        assert (p.gather(1, first[:, end : end + 1]) > 0).all()


def test_drawing_takes_the_numbers_that_single_steps_take():
    model, ids = make("decoder"), torch.tensor([[3, 4], [5, 6]])
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    options = {"temperature": 1.5, "top_k": 20}
    out = generate(model, ids, 37, do_sample=True, generator=ours, **options)
    for step in range(37):
        with torch.no_grad():
            logits = model(out[:, : 2 + step])[:, -1]
        chosen = ops.sample(logits, generator=theirs, **options)
        assert torch.equal(chosen, out[:, 2 + step])
    assert torch.equal(ours.get_state(), theirs.get_state())  # and not one more


def test_streaming_sees_every_token():
    model = make("recurrent")
    ids = torch.randint(1, V, (2, 3))
    seen = []
    out = generate(model, ids, 7, on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), out[:, 3:])


@both
def test_result_may_be_trained_on(kind):
    model = make(kind)
    out = generate(model, torch.randint(1, V, (2, 3)), 4)
    model.loss(out[:, :-1], out[:, 1:]).backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_nothing_to_do():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 3))
    assert torch.equal(generate(model, ids, 0), ids)
    assert generate(model, ids[:0], 5).shape == (0, 3)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([[1]], {"max_new_tokens": -1}, ValueError, "max_new_tokens must not be negative, got -1"),
        ([[]], {}, ValueError, r"ids must be \(B, T\) with T >= 1, got \(1, 0\)"),
        ([1, 2], {}, ValueError, r"ids must be \(B, T\) with T >= 1, got \(2,\)"),
        ([[1, V]], {}, ValueError, r"ids must be in 0\.\.36, got 37"),
        ([[-1, 2]], {}, ValueError, r"ids must be in 0\.\.36, got -1"),
        ([[1.0]], {}, TypeError, "ids must be an int64 tensor, got torch.float32"),
        ([[1]], {"top_p": 0.0}, ValueError, "top_p must be in"),
        ([[1]], {"temperature": 0.0, "do_sample": True}, ValueError, "temperature must be above 0"),
        ([[1]], {"suppress_tokens": [99]}, ValueError, r"suppress_tokens must be in 0\.\.36"),
        ([[1]], {"stop_sequences": [[]]}, ValueError, "a stop sequence must have at least one id"),
        ([[1]], {"attention_mask": torch.ones(1, 2)}, ValueError, "attention_mask must have"),
        ([[1]], {"attention_mask": torch.zeros(1, 1)}, ValueError, "prompt 0 is empty"),
        ([[1]], {"eos_token_id": "end"}, ValueError, "eos_token_id must be an id"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(ids, options, error, message):
    options = {"max_new_tokens": 3, **options}
    dtype = torch.int64 if error is ValueError else None
    with pytest.raises(error, match=message):
        generate(make("decoder"), torch.tensor(ids, dtype=dtype), **options)


@both
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_logits_of_nan_are_told(kind, options):
    model = make(kind)
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
    assert generate(model, torch.tensor([[3, 4]]), 1, **options).shape == (1, 3)
    with pytest.raises(RuntimeError, match="row 1 of logits has no distribution: it holds NaN"):
        generate(model, torch.tensor([[3, 4], [4, 5]]), 4, **options)
    with pytest.raises(RuntimeError, match="it holds NaN"):
        Generator(model).batch().add([3, 5], max_new_tokens=2)
