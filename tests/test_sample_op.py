"""The sampling op: the kernel against the definition on rows of every kind, and its own numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmfast import _extension, ops
from lmfast.generation import sampling_probabilities


def both(logits, **options):
    """Ids and log-probabilities, after comparing the kernel at every level with the reference."""
    plain = ops.sample(logits, backend="torch", return_log_probs=True, **options)
    before = _extension.cpu_isa()
    try:
        for level in _extension.available_cpu_isas():
            _extension.set_cpu_isa(level)
            found = ops.sample(logits, backend="cpu", return_log_probs=True, **options)
            assert torch.equal(found[0], plain[0]), level
            # The kernel's exponentials have 2 units in the last place, and so has their sum.
            torch.testing.assert_close(found[1], plain[1], rtol=2e-6, atol=2e-6)
    finally:
        if before is not None:
            _extension.set_cpu_isa(before)
    return plain


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    size=st.one_of(st.integers(1, 200), st.sampled_from([1023, 1024, 1025, 5003])),
    spread=st.sampled_from([0.0, 0.01, 1.0, 8.0, 60.0]),
    step=st.sampled_from([0.0, 0.25, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 17, 64, 65, 900]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.2]),
    hidden=st.sampled_from([0.0, 0.5]),
)
def test_kernel_equals_definition(seed, size, spread, step, top_k, top_p, min_p, typical_p, hidden):
    if not _extension.cpu.loaded:
        pytest.skip(str(_extension.cpu.reason))
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, size, generator=random) * spread
    if step:  # equal scores
        logits = (logits / step).round() * step
    logits[:, 1:] = logits[:, 1:].masked_fill(
        torch.rand(3, size - 1, generator=random) < hidden, float("-inf")
    )
    uniform = torch.rand(3, generator=random, dtype=torch.float64)
    both(logits, uniform=uniform, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)


COUNTS = torch.tensor([[0, 3, 1, 0] * 10], dtype=torch.int32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.7, "temperature": 1.4},
        {"frequency_penalty": 0.4, "counts": COUNTS},
        {"presence_penalty": 0.9, "counts": COUNTS},
        {"repetition_penalty": 1.7, "counts": COUNTS},
        {"logit_bias": torch.linspace(-2, 2, 40)},
        {"suppress": torch.tensor([0, 7, 39])},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "suppress": [4]},
    ],
    ids=str,
)
def test_draws_of_the_kernel_follow_the_exact_distribution(options, needs_cpu_kernels):
    logits = torch.randn(1, 40) * 1.5
    draws = 30_000
    rows = {k: v.expand(draws, 40) if k == "counts" else v for k, v in options.items()}
    ids = ops.sample(
        logits.expand(draws, 40),
        generator=torch.Generator().manual_seed(3),
        backend="cpu",
        **rows,
    )
    wanted = {k: torch.as_tensor(v) if k == "suppress" else v for k, v in options.items()}
    assert_drawn_from(ids, sampling_probabilities(logits.double(), **wanted)[0])


def test_rows_are_drawn_by_their_own_numbers(needs_cpu_kernels):
    logits, draws = torch.randn(1, 40) * 1.5, 30_000
    per_row = {
        "temperature": torch.tensor([0.5, 1.0, 1.8]),
        "top_k": torch.tensor([0, 9, 25]),
        "top_p": torch.tensor([0.9, 1.0, 0.7]),
    }
    ids = ops.sample(
        logits.expand(3 * draws, 40),
        generator=torch.Generator().manual_seed(4),
        backend="cpu",
        **{name: value.repeat(draws) for name, value in per_row.items()},
    )
    for row in range(3):
        alone = {name: value[row].item() for name, value in per_row.items()}
        assert_drawn_from(ids[row::3], sampling_probabilities(logits.double(), **alone)[0])


def assert_drawn_from(ids, probabilities):
    """Chi-square of the ids' frequencies below its 99.9 % point (Wilson and Hilferty)."""
    expected = len(ids) * probabilities
    observed = torch.bincount(ids, minlength=len(probabilities)).double()
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    # The seed makes the draw reproducible.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit


def test_typical_keeps_what_is_nearest_to_the_entropy():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.05, 0.1]], dtype=torch.float64).log()
    # H = 1.3333: 0.6401, 0.2761, 0.5638, 1.6624, 0.9693 off; so 0.2, 0.15, 0.5, 0.1, 0.05.
    for mass, kept in ((0.2, [1]), (0.3, [1, 2]), (0.5, [0, 1, 2]), (0.9, [0, 1, 2, 4])):
        p = sampling_probabilities(logits, typical_p=mass)[0]
        assert p.nonzero().flatten().tolist() == kept


def test_order_of_ids_and_uniform_decide():
    logits = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    for uniform, expected in ((0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.9999, 2)):
        given_number = torch.tensor([uniform], dtype=torch.float64)
        ids, log_p = both(logits, uniform=given_number)
        assert ids.tolist() == [expected]
        torch.testing.assert_close(log_p, logits[:, expected])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("row", "options"),
    [
        ([1.0, float("nan"), 2.0], {}),
        ([1.0, float("nan"), 2.0], {"top_k": 1}),
        ([1.0, float("inf"), 2.0], {}),
        ([float("-inf")] * 3, {}),
        ([1.0, 2.0, 3.0], {"suppress": [0, 1, 2]}),
    ],
    ids=["nan", "nan greedy", "inf", "-inf", "all suppressed"],
)
def test_rows_without_a_distribution_are_errors(row, options, backend):
    if backend == "cpu" and not _extension.cpu.loaded:
        pytest.skip(str(_extension.cpu.reason))
    logits = torch.tensor([[1.0, 2.0, 3.0], row])
    message = "row 0" if "suppress" in options else "row 1"
    with pytest.raises(RuntimeError, match=f"{message} of logits has no distribution"):
        ops.sample(logits, backend=backend, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"uniform": torch.tensor([0.5, 1.0])}, ValueError, r"uniform must be in \[0, 1\)"),
        ({"uniform": torch.tensor([0.5])}, ValueError, r"uniform must have the shape of logits"),
        ({"suppress": [8]}, ValueError, r"suppress must lie in 0\.\.7, got 8"),
        ({"suppress": [[1]]}, ValueError, "suppress must be one list of ids"),
        ({"logit_bias": torch.zeros(3)}, ValueError, r"logit_bias must have the shape of logits"),
        ({"logit_bias": [0.0]}, TypeError, "logit_bias must be a torch.Tensor, got list"),
        ({"typical_p": 1.1}, ValueError, r"typical_p must be in \(0, 1\], got 1.1"),
        ({"temperature": float("inf")}, ValueError, "temperature must be above 0 and finite"),
        ({"presence_penalty": float("nan")}, ValueError, "presence_penalty must be finite"),
        ({"top_k": torch.tensor([1, 2, 3])}, ValueError, r"top_k must .* \(2,\), got \(3,\)"),
    ],
)  # fmt: skip
def test_impossible_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ops.sample(torch.zeros(2, 8), **options)
