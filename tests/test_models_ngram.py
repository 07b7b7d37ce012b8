"""Count-based model: golden counts, probabilities and perplexities."""

import json
import math

import numpy as np
import pytest
import torch

from lmfast.models import CountLanguageModel

TEXT = "a b c d a b c e".split()


@pytest.fixture
def model():
    model = CountLanguageModel(3)
    model.train(TEXT)
    return model


def test_counts(model):
    assert model.counts[()] == {"a": 2, "b": 2, "c": 2, "d": 1, "e": 1}
    order2 = {c[0]: dict(n) for c, n in model.counts.items() if len(c) == 1}
    assert order2 == {"a": {"b": 2}, "b": {"c": 2}, "c": {"d": 1, "e": 1}, "d": {"a": 1}}
    order3 = {"".join(c): dict(n) for c, n in model.counts.items() if len(c) == 2}
    assert order3 == {"ab": {"c": 2}, "bc": {"d": 1, "e": 1}, "cd": {"a": 1}, "da": {"b": 1}}


def test_prediction(model):
    assert model.predict(["a", "b"]) == "c"
    assert model.predict(["z", "a"]) == "b"
    assert model.predict() == "a"
    assert model.predict(["z", "z"]) == "a"
    assert CountLanguageModel(3).predict(["a"]) is None


def test_backoff_probability(model):
    assert model.probability("d", "a b c".split()) == 0.5
    assert model.probability("c", "a b".split()) == 1
    assert model.probability("a", "a b c".split()) == pytest.approx(3 / 13, rel=1e-15)
    assert model.probability("z", "a b c".split()) == pytest.approx(1 / 13, rel=1e-15)
    total = sum(model.probability(token, "a b c".split()) for token in "abcde")
    assert total == pytest.approx(1.6923077, abs=6e-8)


def test_perplexity(model):
    assert model.perplexity(TEXT, window=3) == pytest.approx(1.4284342706, abs=6e-11)
    assert model.perplexity("b c e a".split(), window=3) == pytest.approx(2.4755320176, abs=6e-11)
    assert model.perplexity([]) == math.inf


@pytest.mark.parametrize("context", ["", "a b c", "z z", "b c", "c d"])
def test_interpolated_probabilities_sum_to_one(context):
    model = CountLanguageModel(3, mode="interpolated")
    model.train(TEXT)
    known = [model.probability(token, context.split()) for token in "abcde"]
    assert sum(known) + model.probability("never seen", context.split()) == pytest.approx(1)


def test_interpolated_value_by_hand():
    model = CountLanguageModel(2, mode="interpolated")
    model.train(TEXT)
    unigram = (1 + 5 * (1 / 6)) / (8 + 5)
    assert model.probability("d", ["c"]) == pytest.approx((1 + 2 * unigram) / (2 + 2), rel=1e-14)


def test_generation_and_order_one(model):
    assert model.generate(["a"], 4) == ["a", "b", "c", "d", "a"]
    unigrams = CountLanguageModel(1)
    unigrams.train("x y y".split())
    assert unigrams.generate(["q"], 2) == ["q", "y", "y"]
    assert CountLanguageModel(2).generate(["q"], 2) == ["q"]


def test_training_twice_adds_counts(model):
    model.train("a c".split())
    assert model.counts[("a",)] == {"b": 2, "c": 1}
    assert model.totals[("a",)] == 3


def test_ids_of_tensors_are_ids():
    model = CountLanguageModel(3)
    model.train(torch.arange(5))
    assert model.probability(torch.tensor(2), torch.tensor([0, 1])) == 1.0
    assert model.probability(np.int64(2), np.array([0, 1])) == 1.0
    with pytest.raises(TypeError, match=r"token must be one token, got tensor\(\[2\]\)"):
        model.probability(torch.tensor([2]))
    with pytest.raises(TypeError, match=r"context must have one dimension, got shape \(\)"):
        model.predict(torch.tensor(1))


def test_errors():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        CountLanguageModel(0)
    with pytest.raises(ValueError, match="mode must be"):
        CountLanguageModel(2, mode="kneser-ney")
    with pytest.raises(ValueError, match="call train first"):
        CountLanguageModel(2).probability("a")
    with pytest.raises(TypeError, match=r"n must be an int, got 2\.5"):
        CountLanguageModel(2.5)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: m.train([["a", "b"]]), TypeError, "tokens must be one text.*once for each"),
        (lambda m: m.train(None), TypeError, "tokens must be a sequence of tokens, got None"),
        (lambda m: m.train(torch.zeros(2, 2)), TypeError, r"one dimension, got shape \(2, 2\)"),
        (lambda m: m.predict(None), TypeError, "context must be a sequence of tokens, got None"),
        (lambda m: m.probability(["a"]), TypeError, r"token must be one token, got \['a'\]"),
        (lambda m: m.perplexity(TEXT, -1), ValueError, "window must be at least 0, got -1"),
        (lambda m: m.generate(["a"], -1), ValueError, "max_new_tokens must be at least 0, got -1"),
        (lambda m: m.generate(["a"], 1.5), TypeError, "max_new_tokens must be an int, got 1.5"),
    ],
)
def test_wrong_calls_name_the_argument(model, call, error, said):
    before = {context: dict(following) for context, following in model.counts.items()}
    with pytest.raises(error, match=said):
        call(model)
    assert model.counts == before


@pytest.mark.parametrize("make", [torch.tensor, np.array, list])
def test_ids_in_a_tensor_are_ids(make):
    """A tensor's elements are equal to nothing but themselves: every count would be one."""
    model = CountLanguageModel(2)
    model.train(make([1, 2, 1, 2, 3]))
    assert model.counts[()] == {1: 2, 2: 2, 3: 1}
    assert model.predict(make([3, 1])) == 2
    assert type(model.predict([1])) is int


@pytest.mark.parametrize("mode", ["backoff", "interpolated"])
@pytest.mark.parametrize("text", ["aéa😀é", "a", "abab" * 50])
def test_character_model_against_counting_again(text, mode):
    """Probabilities of every character after every context, from slices of the text itself."""

    def seen(window):
        return sum(text[i : i + len(window)] == window for i in range(len(text)))

    def slow(character, context):
        v, w = len(set(text)), len(text)
        if mode == "backoff":
            for k in range(min(2, len(context)), 0, -1):
                after = sum(seen(context[-k:] + c) for c in set(text))
                if seen(context[-k:] + character):
                    return seen(context[-k:] + character) / after
            return (seen(character) + 1) / (w + v)
        p = 1 / (v + 1)
        for k in range(min(2, len(context)) + 1):
            c = context[len(context) - k :]
            distinct = sum(seen(c + x) > 0 for x in set(text))
            after = sum(seen(c + x) for x in set(text))
            if distinct:
                p = (seen(c + character) + distinct * p) / (after + distinct)
        return p

    model = CountLanguageModel(3, mode=mode)
    model.train(text)
    letters = [*sorted(set(text)), "?"]
    for context in ["", *letters, *(a + b for a in letters for b in letters)]:
        for character in letters:
            assert model.probability(character, context) == pytest.approx(
                slow(character, context), rel=1e-12
            )


@pytest.mark.parametrize("tokens", [TEXT, "aé😀\n ba", [3, 1, 3, 2], ""])
def test_saving_keeps_everything(tokens, tmp_path):
    model = CountLanguageModel(3, mode="interpolated")
    model.train(tokens)
    model.save(tmp_path / "counts.json")
    other = CountLanguageModel.load(tmp_path / "counts.json")
    assert (other.n, other.mode, other.totals) == (3, "interpolated", model.totals)
    assert [(c, list(f.items())) for c, f in other.counts.items()] == [
        (c, list(f.items())) for c, f in model.counts.items()
    ]
    other.train(tokens)  # and it is a model like any other
    assert repr(other) == repr(model).replace(f"{len(tokens)} tokens", f"{2 * len(tokens)} tokens")


def test_files_that_are_no_counts(model, tmp_path):
    path = tmp_path / "counts.json"
    model.save(path)
    content = json.loads(path.read_text())
    for wrong, said in [
        ([1], "was not written by CountLanguageModel.save"),
        ({**content, "version": 2}, "has version 2, this lmfast reads 1"),
        ({**content, "tokens": ["a"]}, "is damaged: list index"),
        ({**content, "contexts": [[[], [0], [0]]]}, "a count must be at least 1"),
    ]:
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=said):
            CountLanguageModel.load(path)
    tuples = CountLanguageModel(1)
    tuples.train([("a", 1)])
    with pytest.raises(TypeError, match="tokens of type str and int"):
        tuples.save(path)
