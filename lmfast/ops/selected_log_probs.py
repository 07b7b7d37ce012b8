"""The log-probability of given tokens under the output layer, without the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfast.ops.linear_cross_entropy import linear_cross_entropy


def selected_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probabilities of chosen tokens: ``log_softmax(logits / temperature)[target]``.

    With ``logits = hidden @ weight.T + bias``; ``linear_cross_entropy`` with one loss per row,
    negated. Policy-gradient and preference losses need these and no other probabilities.

    Args:
        hidden: (..., E), as in ``linear_cross_entropy``.
        weight: (V, E).
        targets: (...) int64, the tokens; in [0, V) or ``ignore_index``.
        bias: (V,) or None.
        temperature: divides the logits; positive. Not with softcap.
        ignore_index: target of the rows that cost nothing, have the result 0 and no gradient.
        softcap: bound of the logits; None for none.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        targets' shape, float32 (float64 for float64 input), at most 0.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that do not fit, a target outside the vocabulary, a temperature that is
            not positive or is combined with softcap.
        BackendError: the backend asked for cannot run this call.

    Backends:
        Those of ``linear_cross_entropy``.

    Source:
        Shao et al., DeepSeekMath, 2024, arXiv:2402.03300 (GRPO, which uses it).

    Example:
        >>> import lmfast, torch
        >>> hidden, weight = torch.eye(2, 3), torch.eye(4, 3)
        >>> lmfast.ops.selected_log_probs(hidden, weight, torch.tensor([0, 3]))
        tensor([-0.7437, -1.7437])
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if temperature != 1.0:
        if softcap is not None:
            raise ValueError(f"temperature must be 1 with softcap, got {temperature}")
        if isinstance(hidden, Tensor) and hidden.is_floating_point():
            hidden = hidden / temperature
        bias = None if bias is None else bias / temperature
    losses = linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        reduction="none",
        softcap=softcap,
        backend=backend,
    )
    return torch.neg(losses)
