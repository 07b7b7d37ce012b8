"""Which token comes next, in plain PyTorch: what each filter keeps, and the draw."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfast.ops._library import accumulation_dtype

# Columns of the settings (1 or B, 8) in float64.
SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


def penalise(
    logits: Tensor,
    counts: Tensor | None,
    *,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    prompt_mask: Tensor | None = None,
) -> Tensor:
    """Lower the logits of tokens that occurred before.

        l_j -> l_j - frequency * count_j - presence * [count_j > 0], then where count_j > 0 or j is
        in the prompt: l_j -> l_j / repetition if l_j > 0 else l_j * repetition

    Args:
        logits: (B, V).
        counts: (B, V), how often each token was generated; None: never.
        frequency_penalty, presence_penalty, repetition_penalty: a number, or (B,) for one per row.
        prompt_mask: (B, V) bool, tokens that `repetition_penalty` is to count as seen besides.

    Returns:
        New logits (B, V).

    Example:
        >>> logits = torch.tensor([[2.0, 1.5, -1.0]])
        >>> penalise(logits, torch.tensor([[2, 0, 1]]), repetition_penalty=2.0)
        tensor([[ 1.0000,  1.5000, -2.0000]])
    """
    out, seen = logits, prompt_mask
    if counts is not None:
        generated = counts > 0
        out = logits - _column(frequency_penalty, logits) * counts.to(logits.dtype)
        out = out - _column(presence_penalty, logits) * generated.to(logits.dtype)
        seen = generated if seen is None else seen | generated
    if seen is None:
        return out
    factor = _column(repetition_penalty, logits)
    repeated = torch.where(out > 0, out / factor, out * factor)
    return torch.where(seen, repeated, out)


def adjusted_scores(
    logits: Tensor,
    settings: Tensor,
    counts: Tensor | None,
    prompt_mask: Tensor | None,
    bias: Tensor | None,
    suppress: Tensor | None,
) -> Tensor:
    """Logits with bias, penalties and suppressed ids, (B, V) fp32 (fp64 for fp64)."""
    scores = logits.to(accumulation_dtype(logits.dtype))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if counts is not None or prompt_mask is not None:
        frequency, presence, repetition = settings[:, 5:].to(scores.dtype).unbind(1)
        scores = penalise(
            scores,
            counts,
            frequency_penalty=frequency,
            presence_penalty=presence,
            repetition_penalty=repetition,
            prompt_mask=prompt_mask,
        )
    if suppress is not None:
        scores = scores.index_fill(1, suppress, float("-inf"))
    return scores


def kept_weights(scores: Tensor, settings: Tensor) -> Tensor:
    """Weights (B, V) fp64 in proportion to the probabilities: 0 where a filter cuts."""
    temperature, top_k, top_p, min_p, typical_p = (c[:, None] for c in settings[:, :5].unbind(1))
    # By score and not by weight: what differs in the score may have equal weights. Of equal scores
    # a stable sort puts the lower id first.
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    # A row without any finite score has no maximum to subtract; its weights are NaN.
    weights = ((ordered - ordered[:, :1]).double() / temperature).exp()
    rank = torch.arange(scores.shape[-1], device=scores.device)
    weights = weights.masked_fill((rank >= top_k) & (top_k > 0), 0.0)
    # The token that crosses p stays: its predecessors have less than p.
    before = weights.cumsum(-1) - weights
    hidden = (before >= top_p * weights.sum(-1, keepdim=True)) & (top_p < 1)
    hidden |= weights < min_p
    hidden[:, 0] = False
    weights = weights.masked_fill(hidden, 0.0)
    weights = torch.zeros_like(weights).scatter_(-1, ids, weights)
    return torch.where(typical_p < 1, _typical(weights, typical_p), weights)


def _typical(weights: Tensor, mass: Tensor) -> Tensor:
    """The smallest set whose surprise is nearest to the entropy and that reaches the mass."""
    total = weights.sum(-1, keepdim=True)
    probabilities = weights / total
    surprise = -probabilities.log()  # inf where cut before
    entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
    order = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    ordered = weights.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    hidden = before >= mass * total
    hidden[:, 0] = False
    return weights.masked_fill(torch.zeros_like(hidden).scatter_(-1, order, hidden), 0.0)


def draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first ids whose cumulated weight passes uniform * total; log-probabilities (B,) fp64."""
    cumulated = weights.cumsum(-1)
    total = cumulated[:, -1:].contiguous()
    target = uniform[:, None].double() * total
    ids = torch.searchsorted(cumulated, target, right=True)
    # uniform * total may round up to the total: then the last token that has a weight.
    last = torch.searchsorted(cumulated, total)
    ids = torch.minimum(ids, last)
    return ids[:, 0], (weights.gather(-1, ids) / total).log()[:, 0]


def reference(
    logits: Tensor,
    uniform: Tensor,
    settings: Tensor,
    counts: Tensor | None,
    prompt_mask: Tensor | None,
    bias: Tensor | None,
    suppress: Tensor | None,
    want_log_probs: bool,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch: ids (B,) and log-probabilities (B,), or (0,) if not wanted."""
    settings = settings.to(logits.device)
    scores = adjusted_scores(logits, settings, counts, prompt_mask, bias, suppress)
    weights = kept_weights(scores, settings)
    if weights.is_cpu and not torch.compiler.is_compiling():
        bad = (~(weights.sum(-1) > 0)).nonzero().flatten().tolist()
        if bad:
            raise RuntimeError(NO_DISTRIBUTION.format(row=bad[0]))
    ids, log_probs = draw(weights, uniform)
    return ids, log_probs.to(scores.dtype) if want_log_probs else scores.new_empty(0)


NO_DISTRIBUTION = (
    "row {row} of logits has no distribution: it holds NaN or inf, or no token is left to draw"
)


def _column(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Make one value per row broadcast over the vocabulary."""
    return value.to(like)[:, None] if isinstance(value, Tensor) else value
