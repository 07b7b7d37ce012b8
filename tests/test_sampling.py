"""Sampling: golden distributions, order of the filters, ties, penalties, draws, bad numbers."""

import pytest
import torch

from lmfast.generation import sample, sampling_probabilities
from lmfast.generation.sampling import penalise

PRINTED = {"atol": 6e-10, "rtol": 0}
THREE = [4.0, 2.0, 0.0]
EIGHT = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]


def tensor(values):
    return torch.tensor([values], dtype=torch.float64)


def padded(values, size=8):
    return tensor(values + [0.0] * (size - len(values)))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (0.5, [0.9816903928, 0.0179802867, 0.0003293204]),
        (1.0, [0.8668133322, 0.1173104278, 0.01587624]),
        (2.0, [0.6652409558, 0.2447284711, 0.0900305732]),
    ],
)
def test_temperature_golden(temperature, expected):
    p = sampling_probabilities(tensor(THREE), temperature=temperature)
    torch.testing.assert_close(p, tensor(expected), **PRINTED)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"temperature": 0.7},
            [0.512147662, 0.250717617, 0.122736718, 0.060084737,
             0.029413982, 0.014399369, 0.007049091, 0.003450824],
        ),
        ({"temperature": 0.7, "top_k": 3}, [0.578304548, 0.283104168, 0.138591284]),
        (
            {"temperature": 0.7, "top_p": 0.9},
            [0.541561644, 0.265116986, 0.129785809, 0.06353556],
        ),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, [0.731058579, 0.268941421]),
        ({"top_k": 1}, [1.0]),
        ({"top_p": 1e-9}, [1.0]),
        ({"min_p": 0.6}, [0.6224593312, 0.3775406688]),
    ],
)  # fmt: skip
def test_filters_golden(options, expected):
    p = sampling_probabilities(tensor(EIGHT), **options)
    torch.testing.assert_close(p, padded(expected), **PRINTED)


def test_top_p_keeps_only_a_certain_token():
    p = sampling_probabilities(tensor([10.0, 0.0, 0.0, -1.0]), top_p=0.9)
    assert p.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_top_p_keeps_the_crossing_token_and_no_more():
    logits = torch.log(tensor([0.1, 0.5, 0.25, 0.15]))
    p = sampling_probabilities(logits, top_p=0.6)
    torch.testing.assert_close(p, tensor([0.0, 2 / 3, 1 / 3, 0.0]), rtol=1e-12, atol=0)


def test_order_is_kept_when_logits_are_not_sorted():
    order = [5, 0, 7, 2, 6, 1, 3, 4]
    shuffled = tensor([EIGHT[i] for i in order])
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    p = sampling_probabilities(tensor(EIGHT), **options)[0]
    q = sampling_probabilities(shuffled, **options)[0]
    torch.testing.assert_close(q, p[order], rtol=1e-12, atol=0)


def test_top_k_breaks_ties_by_lower_id_and_keeps_exactly_k():
    p = sampling_probabilities(torch.ones(1, 40), top_k=3)
    assert p[0].nonzero().flatten().tolist() == [0, 1, 2]
    p = sampling_probabilities(torch.ones(1, 4), top_k=9)
    assert (p > 0).all()


def test_penalties_golden():
    counts = torch.tensor([[2, 0, 1, 0, 0, 0, 0, 0]])
    out = penalise(tensor(EIGHT), counts, frequency_penalty=0.5, presence_penalty=0.7)
    expected = tensor([0.3, 1.5, -0.2, 0.5, 0.0, -0.5, -1.0, -1.5])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    counts = torch.tensor([[1, 0, 0, 0, 0, 3, 0, 0]])
    out = penalise(tensor(EIGHT), counts, repetition_penalty=2.0)
    expected = tensor([1.0, 1.5, 1.0, 0.5, 0.0, -1.0, -1.0, -1.5])
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    p = sampling_probabilities(tensor(EIGHT), counts=counts, repetition_penalty=2.0)
    torch.testing.assert_close(p, torch.softmax(expected, -1), rtol=1e-12, atol=0)


def test_one_value_per_row():
    logits = torch.tensor([EIGHT] * 3, dtype=torch.float64)
    p = sampling_probabilities(
        logits,
        temperature=torch.tensor([0.7, 0.5, 0.7]),
        top_k=torch.tensor([3, 3, 0]),
        top_p=torch.tensor([1.0, 0.9, 0.9]),
    )
    for row, options in enumerate(
        [
            {"temperature": 0.7, "top_k": 3},
            {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
            {"temperature": 0.7, "top_p": 0.9},
        ]
    ):
        expected = sampling_probabilities(tensor(EIGHT), **options)[0]
        # The per-row numbers are fp32: 0.7 and 0.9 are off by 2e-8.
        torch.testing.assert_close(p[row], expected, rtol=2e-7, atol=0)


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([EIGHT]).expand(20_000, 8)
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.95}
    ids = sample(logits, generator=generator, **options)
    p = sampling_probabilities(logits[:1], **options)[0]
    observed = torch.bincount(ids, minlength=8)
    kept = p > 0
    assert observed[~kept].sum() == 0
    expected = 20_000 * p[kept]
    chi_square = ((observed[kept] - expected) ** 2 / expected).sum()
    # 99.9 % point for at most 4 degrees of freedom; the seed makes the draw reproducible.
    assert chi_square < 18.5


def test_generator_makes_draws_reproducible_and_input_is_not_changed():
    logits, counts = torch.randn(6, 50), torch.randint(0, 3, (6, 50))
    before = logits.clone(), counts.clone()
    draws = [
        sample(
            logits,
            counts=counts,
            frequency_penalty=0.3,
            top_p=0.8,
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(logits, before[0])
    assert torch.equal(counts, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_taken_as_they_are(dtype):
    logits = torch.tensor([EIGHT], dtype=dtype)
    p = sampling_probabilities(logits, top_p=0.9)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, sampling_probabilities(logits.float(), top_p=0.9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 .*got 0.0"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature must be.*\[1.0, -1.0\]"),
        ({"top_k": -1}, "top_k must be 0 .off. or a whole number above, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"counts": torch.zeros(2, 3)}, r"counts must have the shape of logits \(2, 8\)"),
    ],
)
def test_impossible_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(2, 8), **options)
    with pytest.raises(ValueError, match=r"logits must be \(B, V\)"):
        sample(torch.zeros(8))
