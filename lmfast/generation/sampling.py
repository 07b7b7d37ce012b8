"""Drawing the next token, and the distribution it is drawn from."""

from __future__ import annotations

from torch import Tensor

from lmfast.ops._library import accumulation_dtype
from lmfast.ops._sample_reference import adjusted_scores, kept_weights, penalise
from lmfast.ops.sample import OP, sample

__all__ = ["penalise", "sample", "sampling_probabilities"]


def sampling_probabilities(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    typical_p: float | Tensor = 1.0,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    logit_bias: Tensor | None = None,
    suppress: Tensor | None = None,
) -> Tensor:
    """Return the distribution that `lmfast.ops.sample` draws from; arguments as there.

    Returns:
        (B, V) probabilities, fp32 (fp64 for fp64 logits), each row sums to 1.

    Example:
        >>> import torch
        >>> sampling_probabilities(torch.tensor([[4.0, 2.0, 0.0]]), top_k=2)
        tensor([[0.8808, 0.1192, 0.0000]])
    """
    args = OP.check(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        counts=counts,
        prompt_mask=prompt_mask,
        logit_bias=logit_bias,
        suppress=suppress,
    )
    logits, _, settings, *adjustments, _ = args
    return probabilities(logits, settings, *adjustments)


def probabilities(
    logits: Tensor,
    settings: Tensor,
    counts: Tensor | None,
    prompt_mask: Tensor | None,
    bias: Tensor | None,
    suppress: Tensor | None,
) -> Tensor:
    """`sampling_probabilities` on arguments that are checked and brought into the op's form."""
    settings = settings.to(logits.device)
    scores = adjusted_scores(logits, settings, counts, prompt_mask, bias, suppress)
    weights = kept_weights(scores, settings)
    shares = weights / weights.sum(-1, keepdim=True)
    return shares.to(accumulation_dtype(logits.dtype))
