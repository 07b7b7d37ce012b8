"""Beam search over anything that gives log-probabilities step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Reorder = Callable[[Any, Tensor], Any]
Ends = Callable[[Tensor, Tensor], Tensor]


class Beams(NamedTuple):
    """What a beam search found.

    Attributes:
        ids: (B, K, n) int64, best first, padded behind their ends.
        scores: (B, K); -inf where a row has fewer results.
        lengths: (B, K) int64, tokens of each, the end of the text included.
    """

    ids: Tensor
    scores: Tensor
    lengths: Tensor


def beam_search(
    step: Step,
    reorder: Reorder,
    state: Any,
    *,
    batch: int,
    num_beams: int,
    max_length: int,
    bos_idx: int,
    eos_idx: int | list[int],
    pad_idx: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = "never",
    ends: Ends | None = None,
    only_best_end: bool = False,
    device: torch.device | None = None,
) -> Beams:
    """Find likely sequences, several hypotheses per row at a time.

        score(y) = log p(y) / |y|^length_penalty, the end of the text counted in |y|

    With `early_stopping="never"` a row is done when no unfinished hypothesis can still beat its
    worst finished one, so stopping never changes the result; with as many beams as there are
    prefixes the search is then exact.

    Args:
        step: (tokens (N,) int64, state) -> log-probabilities (N, V) of the next token and the
            state after it, for N = batch * num_beams hypotheses, those of a row together.
        reorder: (state, index (N,)) -> the state of the hypotheses with these numbers.
        state: before the first token, for N hypotheses.
        batch: rows B.
        num_beams: hypotheses K per row.
        max_length: longest result, the end of the text included; what has not ended by then
            competes as it is.
        bos_idx, pad_idx: ids of the text's beginning and of what follows its end.
        eos_idx: id or ids of its end.
        length_penalty: 0 compares probabilities, 1 those of an average token; more favours longer
            texts.
        early_stopping: True: a row is done with its first K finished hypotheses; False: also when
            the best running one, at its present length, is behind all K.
        ends: (number of the hypothesis (B, M), token (B, M)) -> whether it ends with it (B, M);
            None: with `eos_idx`.
        only_best_end: of the candidates of a step only the K best may end.
        device: of the results.

    Returns:
        The best K of each row.

    Source: Wu et al. 2016, arXiv:1609.08144 (normalised scores).

    Example:
        >>> import torch
        >>> log_p = torch.tensor([[0.1, 0.6, 0.3]]).log()
        >>> ids, scores, lengths = beam_search(
        ...     lambda tokens, state: (log_p.expand(len(tokens), 3), state),
        ...     lambda state, index: state, None, batch=1, num_beams=2, max_length=2,
        ...     bos_idx=0, eos_idx=2, pad_idx=0,
        ... )
        >>> ids[0].tolist(), lengths[0].tolist()
        ([[1, 1], [1, 2]], [2, 2])
    """
    k = num_beams
    eos = torch.tensor([eos_idx] if isinstance(eos_idx, int) else eos_idx, device=device)
    numbers = torch.arange(batch, device=device)[:, None] * k  # first hypothesis of each row
    alive = torch.full((batch, k), -torch.inf, device=device)
    alive[:, 0] = 0  # the others are the same hypothesis, and come in again as its children
    tokens = torch.full((batch * k,), bos_idx, dtype=torch.int64, device=device)
    texts = torch.full((batch, k, max_length), pad_idx, dtype=torch.int64, device=device)
    done = Beams(texts.clone(), torch.full_like(alive, -torch.inf), numbers.new_zeros(batch, k))
    open_rows = torch.ones(batch, 1, dtype=torch.bool, device=device)

    for length in range(1, max_length + 1):
        log_p, state = step(tokens, state)
        size = log_p.shape[1]
        total = (alive[:, :, None] + log_p.view(batch, k, size).float()).view(batch, k * size)
        # Each hypothesis ends in as many ways as there are end ids, so K of these can go on.
        scores, index = total.topk(min(max(2, 1 + len(eos)) * k, k * size))
        parents, chosen = index // size, index % size
        candidates = _rows(texts, parents)
        candidates[:, :, length - 1] = chosen
        ended = torch.isin(chosen, eos) if ends is None else ends(parents + numbers, chosen)
        may_end = ended & open_rows
        if only_best_end:
            may_end = may_end & (torch.arange(ended.shape[1], device=device) < k)
        finished = scores.masked_fill(~may_end, -torch.inf) / length**length_penalty
        full = done.scores[:, -1:] > -torch.inf
        done = _best(done, finished, candidates, length)
        alive, at = scores.masked_fill(ended, -torch.inf).topk(k)
        texts, tokens = _rows(candidates, at), chosen.gather(1, at).flatten()
        if length == max_length:
            alive = alive.masked_fill(~(open_rows & ~(full & (early_stopping is True))), -torch.inf)
            done = _best(done, alive / length**length_penalty, texts, length)
            break
        most = length**length_penalty
        if early_stopping == "never":
            # Scores are negative: whichever length divides them most is the best they can become.
            most = max(max_length**length_penalty, (length + 1) ** length_penalty)
        full = done.scores[:, -1:] > -torch.inf
        open_rows = open_rows & (alive[:, :1] / most > done.scores[:, -1:])
        if early_stopping is True:
            open_rows = open_rows & ~full
        if not bool(open_rows.any()):
            break
        state = reorder(state, (parents.gather(1, at) + numbers).flatten())
    return Beams(done.ids[:, :, :length], done.scores, done.lengths)


def _best(done: Beams, scores: Tensor, candidates: Tensor, length: int) -> Beams:
    """The K best of the finished ones and new candidates."""
    best, at = torch.cat((done.scores, scores), 1).topk(done.scores.shape[1])
    ids = _rows(torch.cat((done.ids, candidates), 1), at)
    lengths = torch.cat((done.lengths, torch.full_like(scores, length, dtype=torch.int64)), 1)
    return Beams(ids, best, lengths.gather(1, at))


def _rows(texts: Tensor, index: Tensor) -> Tensor:
    """texts (B, K, L) and index (B, M) to the chosen texts (B, M, L)."""
    return texts.gather(1, index[:, :, None].expand(-1, -1, texts.shape[2]))
