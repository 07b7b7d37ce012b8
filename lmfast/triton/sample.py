"""Drawing the next token on NVIDIA GPUs: penalties, top-k, top-p, min-p, typical, without a sort.

A program takes a row. A filter keeps the elements above a threshold and, of those equal to it, the
first few; the threshold is found digit by digit (radix selection): one pass over the row gives, for
each value of the next three bits of an element's key, how many elements have it (top-k) or how much
weight (top-p, typical), and the digit in which the limit falls is the next one of the threshold. A
sort of the row would move it a dozen times; this reads it eleven times, and after top-k only what
top-k has left, which is moved to the front of a scratch row first. Every pass keeps its sums per
thread and adds them across threads once at its end.

Keys are the bits of a score, flipped so that they order as integers. Weights are fp64, as in the
reference: 24 bits would lose the unlikeliest of 50 k tokens, and the two would disagree on draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import next_power_of_2, on_device

_DIGIT = tl.constexpr(3)  # bits found per pass
_BINS = tl.constexpr(8)
_BLOCK = 1024  # with 2048, sums and settings of 512 threads spill 96 bytes


@triton.jit
def _score_key(score):
    """The bits of a score as an integer of 64 bits that orders as the scores do."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648


@triton.jit
def _distance_key(weight, total, entropy):
    """Greatest where the surprise of a token is nearest to the entropy."""
    share = tl.where(weight > 0, weight / total, 1.0)
    distance = tl.abs(-tl.log(share) - entropy)
    bits = distance.to(tl.int64, bitcast=True)
    return tl.where(weight > 0, 0x7FFFFFFFFFFFFFFF - bits, 0)


@triton.jit
def _threshold(
    scores,
    weights,
    count,
    limit,
    total,
    entropy,
    BITS: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(key, what is above it): of the last element that is reached before `limit`.

    Counted from the greatest key down, in elements or, with MASS, in weight. BITS of the keys: 32
    for scores, 63 for distances to the entropy.
    """
    passes: tl.constexpr = (BITS + _DIGIT - 1) // _DIGIT
    bins = tl.arange(0, _BINS)
    prefix = tl.zeros([], tl.int64)
    above = tl.zeros([], tl.float64)
    for step in range(passes):
        shift = tl.full([], 0, tl.int64) + (passes - 1 - step) * _DIGIT
        sums = tl.zeros([_BINS, BLOCK], tl.float64)
        for begin in range(0, count, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            there = i < count
            if BITS == 32:
                key = _score_key(tl.load(scores + i, mask=there, other=float("-inf")))
            if MASS:
                amount = tl.load(weights + i, mask=there, other=0.0)
                if BITS != 32:
                    key = _distance_key(amount, total, entropy)
            else:
                amount = tl.where(there, 1.0, 0.0).to(tl.float64)
            inside = there & ((key >> shift) >> _DIGIT == prefix)
            digit = ((key >> shift) & (_BINS - 1)).to(tl.int32)
            chosen = inside[None, :] & (digit[None, :] == bins[:, None])
            sums += tl.where(chosen, amount[None, :], 0.0)
        found = tl.sum(sums, axis=1)
        higher = tl.sum(tl.where(bins[None, :] > bins[:, None], found[None, :], 0.0), axis=1)
        # The lowest digit that is begun before the limit is reached.
        digit = tl.min(tl.where(above + higher < limit, bins, _BINS - 1), axis=0)
        above += tl.sum(tl.where(bins == digit, higher, 0.0), axis=0)
        prefix = (prefix << _DIGIT) + digit.to(tl.int64)
    return prefix, above


@triton.jit
def _total(weights, count, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        sums += tl.load(weights + i, mask=i < count, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _sample_kernel(
    logits_ptr,
    uniform_ptr,
    settings_ptr,
    counts_ptr,
    mask_ptr,
    bias_ptr,
    suppress_ptr,
    scores_ptr,
    kept_scores_ptr,
    kept_weights_ptr,
    kept_ids_ptr,
    ids_ptr,
    log_probs_ptr,
    size,
    suppressed,
    logits0,
    settings0,
    bias0,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    settings = settings_ptr + row * settings0
    temperature, top_k, top_p = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    min_p, typical_p = tl.load(settings + 3), tl.load(settings + 4)
    frequency = tl.load(settings + 5).to(tl.float32)
    presence = tl.load(settings + 6).to(tl.float32)
    repetition = tl.load(settings + 7).to(tl.float32)
    scores = scores_ptr + row * size
    kept_scores, kept_weights = kept_scores_ptr + row * size, kept_weights_ptr + row * size
    kept_ids = kept_ids_ptr + row * size

    # Bias, penalties, what must not be drawn.
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        there = i < size
        score = tl.load(logits_ptr + row * logits0 + i, mask=there, other=float("-inf"))
        score = score.to(tl.float32)
        if bias_ptr is not None:
            score += tl.load(bias_ptr + row * bias0 + i, mask=there, other=0.0)
        seen = tl.zeros([BLOCK], tl.int1)
        if counts_ptr is not None:
            times = tl.load(counts_ptr + row * size + i, mask=there, other=0)
            seen = times > 0
            score = score - frequency * times.to(tl.float32)
            score = score - tl.where(seen, presence, 0.0)
        if mask_ptr is not None:
            seen = seen | (tl.load(mask_ptr + row * size + i, mask=there, other=0) != 0)
        score = tl.where(seen, tl.where(score > 0, score / repetition, score * repetition), score)
        score = tl.where(score == 0, 0.0, score)  # -0 is no less than 0
        tl.store(scores + i, score, mask=there)
        tops = tl.maximum(tops, score)
    tl.debug_barrier()
    if suppress_ptr is not None:
        for begin in range(0, suppressed, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            listed = tl.load(suppress_ptr + i, mask=i < suppressed, other=0)
            tl.store(scores + listed, float("-inf"), mask=i < suppressed)
        tl.debug_barrier()
        tops = tl.full([BLOCK], float("-inf"), tl.float32)
        for begin in range(0, size, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            tops = tl.maximum(tops, tl.load(scores + i, mask=i < size, other=float("-inf")))
    top = tl.max(tops, axis=0)

    # top-k by score; what it leaves goes to the front, in the order of ids.
    cut = (top_k > 0) & (top_k < size)
    threshold, above = tl.full([], -1, tl.int64), tl.zeros([], tl.float64)
    if cut:
        threshold, above = _threshold(
            scores, kept_weights, size, top_k, 1.0, 0.0, BITS=32, MASS=False, BLOCK=BLOCK
        )
    room = top_k - above  # of those at the threshold
    count, equal = tl.zeros([], tl.int32), tl.zeros([], tl.float64)
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        there = i < size
        score = tl.load(scores + i, mask=there, other=float("-inf"))
        key = _score_key(score)
        tie = there & (key == threshold)
        before = equal + tl.cumsum(tl.where(tie, 1.0, 0.0).to(tl.float64), axis=0)
        keep = there & ((key > threshold) | (tie & (before <= room)))
        equal += tl.sum(tl.where(tie, 1.0, 0.0).to(tl.float64), axis=0)
        # What has no weight is not needed any more, and no filter counts it.
        weight = tl.exp((score - top).to(tl.float64) / temperature)
        keep = keep & (weight > 0)
        place = count + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(kept_scores + place, score, mask=keep)
        tl.store(kept_weights + place, weight, mask=keep)
        tl.store(kept_ids + place, i, mask=keep)
        count += tl.sum(keep.to(tl.int32), axis=0)
    tl.debug_barrier()

    # top-p by score, min-p.
    total = _total(kept_weights, count, BLOCK)
    if top_p < 1:
        threshold, above = _threshold(
            *(kept_scores, kept_weights, count, top_p * total, 1.0, 0.0),
            BITS=32,
            MASS=True,
            BLOCK=BLOCK,
        )
        passed = tl.zeros([], tl.float64)
        for begin in range(0, count, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            there = i < count
            key = _score_key(tl.load(kept_scores + i, mask=there, other=float("-inf")))
            weight = tl.load(kept_weights + i, mask=there, other=0.0)
            tie = tl.where(there & (key == threshold), weight, 0.0)
            before = above + passed + tl.cumsum(tie, axis=0) - tie
            hidden = (key < threshold) | ((key == threshold) & (before >= top_p * total))
            passed += tl.sum(tie, axis=0)
            tl.store(kept_weights + i, tl.where(hidden, 0.0, weight), mask=there)
        tl.debug_barrier()
    if min_p > 0:
        for begin in range(0, count, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            weight = tl.load(kept_weights + i, mask=i < count, other=0.0)
            tl.store(kept_weights + i, tl.where(weight < min_p, 0.0, weight), mask=i < count)
        tl.debug_barrier()

    if typical_p < 1:
        total = _total(kept_weights, count, BLOCK)
        sums = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, count, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            p = tl.load(kept_weights + i, mask=i < count, other=0.0) / total
            sums -= tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
        entropy = tl.sum(sums, axis=0)
        threshold, above = _threshold(
            *(kept_scores, kept_weights, count, typical_p * total, total, entropy),
            BITS=63,
            MASS=True,
            BLOCK=BLOCK,
        )
        passed = tl.zeros([], tl.float64)
        for begin in range(0, count, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            there = i < count
            weight = tl.load(kept_weights + i, mask=there, other=0.0)
            key = _distance_key(weight, total, entropy)
            tie = tl.where(there & (key == threshold), weight, 0.0)
            before = above + passed + tl.cumsum(tie, axis=0) - tie
            hidden = (key < threshold) | ((key == threshold) & (before >= typical_p * total))
            passed += tl.sum(tie, axis=0)
            tl.store(kept_weights + i, tl.where(hidden, 0.0, weight), mask=there)
        tl.debug_barrier()

    # The first id at which the cumulated weight passes the uniform number's share.
    total = _total(kept_weights, count, BLOCK)
    target = tl.load(uniform_ptr + row) * total
    passed = tl.zeros([], tl.float64)
    first, last = count, tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        weight = tl.load(kept_weights + i, mask=i < count, other=0.0)
        beyond = (weight > 0) & (passed + tl.cumsum(weight, axis=0) > target)
        first = tl.minimum(first, tl.min(tl.where(beyond, i, count), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, i, 0), axis=0))
        passed += tl.sum(weight, axis=0)
    # The share may round up to the whole: then the last one. A row without any weight gives 0.
    at = tl.minimum(first, last)
    some = count > 0
    tl.store(ids_ptr + row, tl.load(kept_ids + at, mask=some, other=0).to(tl.int64))
    if log_probs_ptr is not None:
        weight = tl.load(kept_weights + at, mask=some, other=float("nan"))
        tl.store(log_probs_ptr + row, tl.log(weight / total).to(tl.float32))


def _on_device(settings: Tensor, device: torch.device) -> Tensor:
    if settings.device == device:
        return settings
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph would copy from this tensor's memory again, when it is long gone.
        numbers = (
            torch.full((1,), x, dtype=settings.dtype, device=device) for x in settings[0].tolist()
        )
        return torch.stack(tuple(numbers), dim=1)
    return settings.to(device, non_blocking=True)


def sample(
    logits: Tensor,
    uniform: Tensor,
    settings: Tensor,
    counts: Tensor | None,
    prompt_mask: Tensor | None,
    bias: Tensor | None,
    suppress: Tensor | None,
    want_log_probs: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; the arguments of ``lmfast::sample``."""
    batch, size = logits.shape
    ids = logits.new_empty((batch,), dtype=torch.int64)
    log_probs = logits.new_empty((batch if want_log_probs else 0,), dtype=torch.float32)
    if batch == 0:
        return ids, log_probs
    settings = _on_device(settings, logits.device)
    scores, kept_scores = logits.new_empty((2, batch, size), dtype=torch.float32).unbind()
    kept_weights = logits.new_empty((batch, size), dtype=torch.float64)
    kept_ids = logits.new_empty((batch, size), dtype=torch.int32)
    with on_device(logits):
        _sample_kernel[(batch,)](
            *(logits, uniform, settings, counts, prompt_mask, bias, suppress),
            *(scores, kept_scores, kept_weights, kept_ids, ids),
            log_probs if want_log_probs else None,
            size,
            0 if suppress is None else suppress.shape[0],
            logits.stride(0),
            settings.stride(0) if settings.shape[0] > 1 else 0,
            bias.stride(0) if bias is not None and bias.dim() == 2 else 0,
            BLOCK=min(_BLOCK, max(64, next_power_of_2(size))),
            num_warps=16,
        )
    return ids, log_probs
