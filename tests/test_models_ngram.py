"""Count-based model: golden counts, probabilities and perplexities."""

import math

import pytest

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


def test_errors():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        CountLanguageModel(0)
    with pytest.raises(ValueError, match="mode must be"):
        CountLanguageModel(2, mode="kneser-ney")
    with pytest.raises(ValueError, match="call train first"):
        CountLanguageModel(2).probability("a")
