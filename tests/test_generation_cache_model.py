"""Logits of a decoder with a cache equal those of the whole text, whatever way it was fed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmfast.generation import KVCache
from lmfast.models import DecoderLanguageModel

LENGTH = 150
# The largest logits are 6. Sums in another order: 2.4e-6 seen. bf16 storage rounds keys and values
# to 8 bits, 0.019 seen; int8 to 127 steps of the largest number of each, 0.040 seen.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 2e-5, torch.bfloat16: 0.04, torch.int8: 0.08}
EXACT = {"rtol": 0, "atol": TOLERANCES[torch.float32]}


def make_model(window: int | None) -> DecoderLanguageModel:
    torch.manual_seed(3)
    options = {} if window is None else {"windows": [window, None], "qk_norm": True}
    return DecoderLanguageModel(31, 32, 4, 2, 0, num_kv_heads=2, **options).requires_grad_(False)


MODELS = {window: make_model(window) for window in (None, 7, 70)}
IDS = torch.randint(1, 31, (3, LENGTH), generator=torch.Generator().manual_seed(1))
FULL = {window: model(IDS) for window, model in MODELS.items()}  # (B, T, V)
WINDOWS = st.sampled_from(list(MODELS))
EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)


def new_cache(window: int | None, batch: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(2, batch, 2, 8, dtype=dtype, window=[window, None])


def feed(
    window: int | None,
    cache: KVCache,
    ids: Tensor,
    counts: list[int] | None = None,
    padding: str = "right",
) -> Tensor:
    """Logits (B, T, V) of the next tokens."""
    model = MODELS[window]
    layers = [cache.layer(index, counts, padding) for index in range(2)]
    return model._logits(model._run(ids, None, layers))


@EXAMPLES
@given(
    window=WINDOWS,
    chunks=st.lists(st.sampled_from([1, 2, 5, 17, 64, 90]), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8]),
)
def test_any_chunking(window: int | None, chunks: list[int], dtype: torch.dtype) -> None:
    cache = new_cache(window, 3, dtype)
    start = 0
    for chunk in chunks:
        part = IDS[:, start : start + chunk]
        if part.shape[1] == 0:
            break
        expected = FULL[window][:, start : start + chunk]
        logits = feed(window, cache, part)
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCES[dtype])
        start += part.shape[1]
    assert cache.lengths.tolist() == [start] * 3


@EXAMPLES
@given(data=st.data(), window=WINDOWS, padding=st.sampled_from(["left", "right"]))
def test_rows_of_any_length(data: st.DataObject, window: int | None, padding: str) -> None:
    cache = new_cache(window, 3)
    starts = [0, 0, 0]
    for _ in range(3):
        width = data.draw(st.sampled_from([1, 3, 20, 45]))
        counts = [data.draw(st.integers(0, width)) for _ in starts]
        ids = torch.zeros(3, width, dtype=torch.int64)
        places = [slice(width - n, width) if padding == "left" else slice(n) for n in counts]
        for row, (start, n, place) in enumerate(zip(starts, counts, places, strict=True)):
            ids[row, place] = IDS[row, start : start + n]
        logits = feed(window, cache, ids, counts, padding)
        for row, (start, n, place) in enumerate(zip(starts, counts, places, strict=True)):
            expected = FULL[window][row, start : start + n]
            torch.testing.assert_close(logits[row, place], expected, **EXACT)
        starts = [start + n for start, n in zip(starts, counts, strict=True)]
    assert cache.lengths.tolist() == starts


@EXAMPLES
@given(
    window=st.sampled_from([None, 70]),
    prompt=st.integers(1, 60),
    order=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    back=st.integers(0, 20),
)
def test_after_going_back_and_apart(
    window: int | None, prompt: int, order: list[int], back: int
) -> None:
    cache = new_cache(window, 3)
    feed(window, cache, IDS[:, :prompt])
    fork = cache.fork()
    fork.reorder(order)
    mixed = IDS[order]
    # The fork goes on; the original goes back and then on; neither disturbs the other.
    for end in range(prompt, prompt + 3):
        logits = feed(window, fork, mixed[:, end : end + 1])
        torch.testing.assert_close(logits, FULL[window][order, end : end + 1], **EXACT)
    start = max(0, prompt - back)
    cache.truncate(start)
    logits = feed(window, cache, IDS[:, start:100])
    torch.testing.assert_close(logits, FULL[window][:, start:100], **EXACT)
    logits = feed(window, fork, mixed[:, prompt + 3 : 120])
    torch.testing.assert_close(logits, FULL[window][order, prompt + 3 : 120], **EXACT)


@EXAMPLES
@given(window=st.sampled_from([None, 70]), prompt=st.integers(1, 69), reused=st.integers(0, 69))
def test_a_new_row_reuses_a_prefix(window: int | None, prompt: int, reused: int) -> None:
    reused = min(prompt, reused)
    cache = new_cache(window, 1)
    feed(window, cache, IDS[:1, :prompt])
    (row,) = cache.add_rows()
    cache.share_prefix(0, [row], reused)
    assert cache.lengths.tolist() == [prompt, reused]
    twice = IDS[[0, 0]]
    width = 100 - reused
    counts = [100 - prompt, width]
    ids = torch.stack((twice[0, prompt : prompt + width], twice[1, reused:100]))
    logits = feed(window, cache, ids, counts)
    torch.testing.assert_close(logits[0, : counts[0]], FULL[window][0, prompt:100], **EXACT)
    torch.testing.assert_close(logits[1], FULL[window][0, reused:100], **EXACT)
    cache.remove_rows([0])
    logits = feed(window, cache, IDS[:1, 100:120])
    torch.testing.assert_close(logits, FULL[window][:1, 100:120], **EXACT)


@pytest.mark.parametrize("window", [None, 7])
def test_the_models_own_state_and_steps(window: int | None) -> None:
    model = MODELS[window]
    state = model.new_state(3)
    lengths = torch.tensor([9, 1, 5])
    logits, state = model.step(IDS[:, :9], state, lengths)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row], FULL[window][row, n - 1], **EXACT)
    assert state.lengths.tolist() == lengths.tolist()
    following = IDS[torch.arange(3), lengths][:, None]
    logits, state = model.step(following, state)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row], FULL[window][row, n], **EXACT)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_a_cache_goes_in_and_out_of_inference_mode(inside) -> None:
    with inside():
        cache = new_cache(7, 3)
        feed(7, cache, IDS[:, :40])
    cache.reorder([1, 1, 0])
    rows = [1, 1, 0]
    with torch.no_grad():
        logits = feed(7, cache, IDS[rows, 40:140])
    torch.testing.assert_close(logits, FULL[7][rows, 40:140], **EXACT)
    with torch.inference_mode():
        logits = feed(7, cache, IDS[rows, 140:])
    torch.testing.assert_close(logits, FULL[7][rows, 140:], **EXACT)
