"""``linear_cross_entropy`` in plain PyTorch, a few rows at a time, with its gradients.

A chunk's logits are turned into their own gradient and multiplied away before the next chunk's
are made, so that memory stays bounded whatever the number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast.ops._library import accumulation_dtype, is_readable
from lmfast.ops._linear_cross_entropy_arguments import with_shape

# 16 MB of fp32 logits: large enough for full matmul speed, small enough to stay in the
# last-level cache between its four uses.
LOGITS_PER_CHUNK = 4 * 1024 * 1024


def row_losses(
    logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss and the log-probabilities of every row, from finished logits in the accumulation
    dtype, and the logsumexp, with ``z_loss`` alone.

    ``targets`` must be valid indices. The logsumexp less a logit would lose what the two have in
    common: at logits of a million two digits remain.
    """
    log_probs = logits.log_softmax(-1)
    losses = -log_probs.gather(-1, targets[:, None])[:, 0]
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)
    if not z_loss:
        return losses, log_probs, None
    lse = logits.logsumexp(-1)
    return losses + z_loss * lse.square(), log_probs, lse


def output_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, bf16: bool
) -> Tensor:
    """``hidden @ weight.T + bias``, capped, in the accumulation dtype; bf16: of bf16 factors."""
    result = accumulation_dtype(hidden.dtype)
    if bf16:
        hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
    elif hidden.dtype != weight.dtype:
        hidden, weight = hidden.to(result), weight.to(result)
    logits = F.linear(hidden, weight).to(result)
    if bias is not None:
        logits = logits + bias.to(result)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def reduce_losses(losses: Tensor, keep: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    """Zero where ``keep`` is not set; summed, or averaged over the rows kept, 0 if none are."""
    losses = torch.where(keep, losses, 0.0)
    if reduction == "none":
        return losses.reshape(shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / keep.sum().clamp_min(1)


def chunked_linear_cross_entropy(
    dloss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    bf16: bool,
    *,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and the gradients asked for.

    Args:
        dloss: incoming gradient, of the loss's shape; None for ones.
        hidden, weight, ..., bf16: the op's normalised arguments.
        wanted: which of the gradients of hidden, weight and bias to compute.

    Returns:
        (loss, dhidden, dweight, dbias), None for what was not wanted.
    """
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    keep = flat != ignore_index
    index = None
    # The number of rows kept is data: a graph must not depend on it, nor a GPU wait for it.
    if is_readable(keep) and not keep.all():
        index = keep.nonzero()[:, 0]
    scale = keep.to(accumulation_dtype(hidden.dtype))
    if reduction == "mean":
        scale = scale / keep.sum().clamp_min(1)
    if dloss is not None:
        scale = scale * dloss.reshape(-1).to(scale.dtype)
    safe = torch.where(keep, flat, 0)
    if index is not None:
        rows, safe, scale = rows[index], safe[index], scale[index]
    step = max(1, LOGITS_PER_CHUNK // max(1, weight.shape[0]))
    parts, dhidden_parts = [], []
    dweight = weight.new_zeros(weight.shape, dtype=scale.dtype) if wanted[1] else None
    dbias = weight.new_zeros(weight.shape[:1], dtype=scale.dtype) if wanted[2] else None
    for start in range(0, rows.shape[0], step):
        h, t = rows[start : start + step], safe[start : start + step]
        logits = output_logits(h, weight, bias, softcap, bf16)
        losses, log_probs, lse = row_losses(logits, t, label_smoothing, z_loss)
        parts.append(losses)
        if not any(wanted):
            continue
        slope = 1 - (logits / softcap).square() if softcap else None
        grad = log_probs.exp_()
        if lse is not None:
            grad *= (1 + 2 * z_loss * lse)[:, None]
        if label_smoothing:
            grad -= label_smoothing / weight.shape[0]
        grad.scatter_add_(-1, t[:, None], grad.new_full((t.shape[0], 1), label_smoothing - 1))
        if slope is not None:
            grad *= slope
        grad *= scale[start : start + step, None]
        if dbias is not None:
            dbias += grad.sum(0)
        grad = grad.to(torch.bfloat16 if bf16 else torch.promote_types(h.dtype, weight.dtype))
        if wanted[0]:
            dhidden_parts.append((grad @ weight.to(grad.dtype)).to(hidden.dtype))
        if dweight is not None:
            dweight += grad.t() @ h.to(grad.dtype)
    losses = torch.cat(parts) if parts else scale
    dhidden = None
    if wanted[0]:
        dhidden = torch.cat(dhidden_parts) if dhidden_parts else torch.zeros_like(rows)
    if index is not None:
        losses = losses.new_zeros(flat.shape).index_copy_(0, index, losses)
        if dhidden is not None:
            dhidden = hidden.new_zeros(flat.shape + hidden.shape[-1:]).index_copy_(
                0, index, dhidden
            )
    loss = reduce_losses(losses, keep, reduction, targets.shape)
    return (
        loss,
        None if dhidden is None else with_shape(dhidden, hidden.shape),
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )
