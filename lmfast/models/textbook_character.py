"""The one-hot character network with back-propagation through time written out by hand.

    h_t = tanh(x_t Wxh + h_{t-1} Whh + bh),   logits_t = h_t Why + by

x_t is one-hot, so that x_t Wxh is a row of Wxh. It trains a small model as older textbooks do, and
is the oracle for gradients that come from autograd or from kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CharacterWeights(NamedTuple):
    """Wxh (V, H), Whh (H, H), bh (H,), Why (H, V), by (V,); also their gradients."""

    wxh: Tensor
    whh: Tensor
    bh: Tensor
    why: Tensor
    by: Tensor


def character_weights(
    vocab_size: int, hidden: int = 64, *, generator: torch.Generator | None = None
) -> CharacterWeights:
    """Return normal(0, 0.01) matrices and zero biases, in float64."""

    def normal(*shape: int) -> Tensor:
        return 0.01 * torch.randn(shape, generator=generator, dtype=torch.float64)

    return CharacterWeights(
        normal(vocab_size, hidden),
        normal(hidden, hidden),
        torch.zeros(hidden, dtype=torch.float64),
        normal(hidden, vocab_size),
        torch.zeros(vocab_size, dtype=torch.float64),
    )


def character_step(
    weights: CharacterWeights, ids: Tensor, targets: Tensor, h0: Tensor, clip: float | None = None
) -> tuple[Tensor, CharacterWeights, Tensor]:
    """One pass forwards and one backwards through time, without autograd.

    Args:
        weights: the network.
        ids, targets: (B, T) int64.
        h0: (B, H), the state before the first character.
        clip: limit of every element of every gradient; None for none. Textbooks take 5.

    Returns:
        The summed cross-entropy, the gradients, and the state (B, H) after the last character.

    Example:
        >>> weights = character_weights(7, 4)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> loss, grads, h = character_step(weights, ids, ids, torch.zeros(1, 4).double())
        >>> grads.wxh.shape, h.shape
        (torch.Size([7, 4]), torch.Size([1, 4]))
    """
    wxh, whh, bh, why, by = weights
    steps, states, probabilities = ids.shape[1], [h0], []
    loss = h0.new_zeros(())
    for t in range(steps):
        states.append(torch.tanh(wxh[ids[:, t]] + states[-1] @ whh + bh))
        log_p = F.log_softmax(states[-1] @ why + by, 1)
        loss = loss - log_p.gather(1, targets[:, t : t + 1]).sum()
        probabilities.append(log_p.exp())
    grads = CharacterWeights(*(torch.zeros_like(w) for w in weights))
    carried = torch.zeros_like(h0)
    for t in reversed(range(steps)):
        h, before = states[t + 1], states[t]
        dlogits = probabilities[t] - F.one_hot(targets[:, t], by.shape[0])
        grads.why.addmm_(h.t(), dlogits)
        grads.by.add_(dlogits.sum(0))
        da = (dlogits @ why.t() + carried) * (1 - h * h)
        grads.bh.add_(da.sum(0))
        grads.whh.addmm_(before.t(), da)
        grads.wxh.index_add_(0, ids[:, t], da)
        carried = da @ whh.t()
    if clip is not None:
        for grad in grads:
            grad.clamp_(-clip, clip)
    return loss, grads, states[-1]
