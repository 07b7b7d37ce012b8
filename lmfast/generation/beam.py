"""Beam search over anything that gives log-probabilities step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Reorder = Callable[[Any, Tensor], Any]


def beam_search(
    step: Step,
    reorder: Reorder,
    state: Any,
    *,
    batch: int,
    num_beams: int,
    max_length: int,
    bos_idx: int,
    eos_idx: int,
    pad_idx: int,
    length_penalty: float = 1.0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Find likely sequences, several hypotheses per row at a time.

        score(y) = log p(y) / |y|^length_penalty, the end of the text counted in |y|

    A row is done when no unfinished hypothesis can still beat its worst finished one, so stopping
    early never changes the result; with as many beams as there are prefixes the search is exact.

    Args:
        step: (tokens (N,) int64, state) -> log-probabilities (N, V) of the next token and the
            state after it, for N = batch * num_beams hypotheses, those of a row together.
        reorder: (state, index (N,)) -> the state of the hypotheses with these numbers.
        state: before the first token, for N hypotheses.
        batch: rows B.
        num_beams: hypotheses K per row.
        max_length: longest result, the end of the text included; what has not ended by then
            competes as it is.
        bos_idx, eos_idx, pad_idx: ids of the text's beginning, its end, and what follows it.
        length_penalty: 0 compares probabilities, 1 those of an average token; more favours longer
            texts.
        device: of the results.

    Returns:
        ids (B, K, n), best first, and scores (B, K); -inf where a row has fewer results.

    Source: Wu et al. 2016, arXiv:1609.08144 (normalised scores).

    Example:
        >>> import torch
        >>> log_p = torch.tensor([[0.1, 0.6, 0.3]]).log()
        >>> ids, scores = beam_search(
        ...     lambda tokens, state: (log_p.expand(len(tokens), 3), state),
        ...     lambda state, index: state, None, batch=1, num_beams=2, max_length=2,
        ...     bos_idx=0, eos_idx=2, pad_idx=0,
        ... )
        >>> ids[0].tolist()
        [[1, 1], [1, 2]]
    """
    k = num_beams
    numbers = torch.arange(batch, device=device)[:, None] * k  # first hypothesis of each row
    alive = torch.full((batch, k), -torch.inf, device=device)
    alive[:, 0] = 0  # the others are the same hypothesis, and come in again as its children
    tokens = torch.full((batch * k,), bos_idx, dtype=torch.int64, device=device)
    texts = torch.full((batch, k, max_length), pad_idx, dtype=torch.int64, device=device)
    done, done_texts = torch.full_like(alive, -torch.inf), texts.clone()

    def keep(scores: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The K best of the finished ones and new candidates."""
        best, at = torch.cat((done, scores), 1).topk(k)
        return best, _rows(torch.cat((done_texts, candidates), 1), at)

    for length in range(1, max_length + 1):
        log_p, state = step(tokens, state)
        size = log_p.shape[1]
        total = (alive[:, :, None] + log_p.view(batch, k, size).float()).view(batch, k * size)
        # Each hypothesis ends in one way only, so K of 2 K candidates go on.
        scores, index = total.topk(min(2 * k, k * size))
        parents, chosen = index // size, index % size
        candidates = _rows(texts, parents)
        candidates[:, :, length - 1] = chosen
        ended = chosen == eos_idx
        finished = scores.masked_fill(~ended, -torch.inf) / length**length_penalty
        done, done_texts = keep(finished, candidates)
        alive, at = scores.masked_fill(ended, -torch.inf).topk(k)
        texts, tokens = _rows(candidates, at), chosen.gather(1, at).flatten()
        # Scores are negative: whichever length divides them most is the best they can become.
        most = max(max_length**length_penalty, min(length + 1, max_length) ** length_penalty)
        if length == max_length or bool((done[:, -1] >= alive[:, 0] / most).all()):
            break
        state = reorder(state, (parents.gather(1, at) + numbers).flatten())
    if length == max_length:
        done, done_texts = keep(alive / length**length_penalty, texts)
    return done_texts[:, :, :length], done


def _rows(texts: Tensor, index: Tensor) -> Tensor:
    """texts (B, K, L) and index (B, M) to the chosen texts (B, M, L)."""
    return texts.gather(1, index[:, :, None].expand(-1, -1, texts.shape[2]))
