"""Drawing the next token: penalties, temperature, top-k, top-p, min-p, in this order."""

from __future__ import annotations

import torch
from torch import Tensor


def penalise(
    logits: Tensor,
    counts: Tensor,
    *,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
) -> Tensor:
    """Lower the logits of tokens that occurred before.

        l_j -> l_j - frequency * count_j - presence * [count_j > 0], then where count_j > 0
        l_j -> l_j / repetition if l_j > 0 else l_j * repetition

    Args:
        logits: (B, V).
        counts: (B, V), how often each token occurred.
        frequency_penalty, presence_penalty, repetition_penalty: a number, or (B,) for one per row.

    Returns:
        New logits (B, V).

    Example:
        >>> logits = torch.tensor([[2.0, 1.5, -1.0]])
        >>> penalise(logits, torch.tensor([[2, 0, 1]]), repetition_penalty=2.0)
        tensor([[ 1.0000,  1.5000, -2.0000]])
    """
    seen = counts > 0
    out = logits - _column(frequency_penalty, logits) * counts.to(logits.dtype)
    out = out - _column(presence_penalty, logits) * seen.to(logits.dtype)
    factor = _column(repetition_penalty, logits)
    repeated = torch.where(out > 0, out / factor, out * factor)
    return torch.where(seen, repeated, out)


def sampling_probabilities(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Return the distribution that `sample` draws from; arguments as there.

    Returns:
        (B, V) probabilities, fp32 (fp64 for fp64 logits), each row sums to 1.

    Example:
        >>> sampling_probabilities(torch.tensor([[4.0, 2.0, 0.0]]), top_k=2)
        tensor([[0.8808, 0.1192, 0.0000]])
    """
    _check(logits, temperature, top_k, top_p, min_p, repetition_penalty, counts)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if counts is not None:
        scores = penalise(
            scores,
            counts,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            repetition_penalty=repetition_penalty,
        )
    scores = scores / _column(temperature, scores)
    if _is(top_k, 0) and _is(top_p, 1.0) and _is(min_p, 0.0):
        return torch.softmax(scores, dim=-1)
    # A stable sort puts the lower id first among equal logits, so that exactly k survive.
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    if not _is(top_k, 0):
        k = _column(top_k, scores)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        ordered = ordered.masked_fill((rank >= k) & (k > 0), float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    # The token that crosses p stays: its predecessors have less than p.
    before = probabilities.cumsum(-1) - probabilities
    hidden = before >= _column(top_p, scores)
    hidden |= probabilities < _column(min_p, scores) * probabilities[..., :1]
    hidden[..., 0] = False
    probabilities = probabilities.masked_fill(hidden, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, ids, probabilities)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    counts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row.

        penalties -> softmax(logits / temperature) -> top-k -> top-p -> min-p -> renormalise -> draw

    Args:
        logits: (B, V), never changed. -inf = impossible.
        temperature: above 0. Below 1 sharpens, above 1 flattens. For the likeliest token take
            `argmax`; 0 is not accepted as a name for it.
        top_k: keep the k likeliest, ties by lower id; 0 = all, and so does k >= V.
        top_p: in (0, 1]; keep the smallest number of likeliest tokens that together reach p.
        min_p: in [0, 1]; keep tokens at least min_p times as likely as the likeliest.
        frequency_penalty, presence_penalty, repetition_penalty: as in `penalise`.
        counts: (B, V) occurrences so far; without them the penalties do nothing.
        generator: source of randomness, PyTorch's default one if None.
        All numbers may be (B,) tensors with one value per row.

    Returns:
        ids (B,) int64.

    Raises:
        ValueError: an argument is out of range, or `logits` or `counts` has another shape.

    Backends: PyTorch.

    Source: Holtzman et al. 2019 (top-p), arXiv:1904.09751; Keskar et al. 2019 (repetition),
    arXiv:1909.05858.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0, 0.0]])
        >>> sample(logits, top_k=1)
        tensor([1])
    """
    probabilities = sampling_probabilities(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        counts=counts,
    )
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_sampling(
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    repetition_penalty: float | Tensor,
) -> None:
    """Raise ValueError for a number that no distribution has.

    Tensors are checked only in host memory: reading them on a GPU would wait for the device.
    """
    for name, value, valid, wanted in (
        ("temperature", temperature, lambda t: t > 0, "above 0 (argmax is the limit at 0)"),
        ("top_k", top_k, lambda k: k >= 0, "0 (off) or more"),
        ("top_p", top_p, lambda p: (p > 0) & (p <= 1), "in (0, 1]"),
        ("min_p", min_p, lambda p: (p >= 0) & (p <= 1), "in [0, 1]"),
        ("repetition_penalty", repetition_penalty, lambda r: r > 0, "above 0 (1 is off)"),
    ):
        if isinstance(value, Tensor):
            if value.device.type == "cpu" and not bool(valid(value).all()):
                raise ValueError(f"{name} must be {wanted}, got {value.tolist()}")
        elif not valid(value):
            raise ValueError(f"{name} must be {wanted}, got {value}")


def _check(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    repetition_penalty: float | Tensor,
    counts: Tensor | None,
) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, V) with V >= 1, got {tuple(logits.shape)}")
    if counts is not None and counts.shape != logits.shape:
        raise ValueError(
            f"counts must have the shape of logits {tuple(logits.shape)}, got {tuple(counts.shape)}"
        )
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)


def _column(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Make one value per row broadcast over the vocabulary."""
    return value.to(like.device)[:, None] if isinstance(value, Tensor) else value


def _is(value: float | Tensor, neutral: float) -> bool:
    return not isinstance(value, Tensor) and value == neutral
