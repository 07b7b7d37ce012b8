"""A language model that counts: the longest context seen before decides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Generic, TypeVar

Token = TypeVar("Token")


class CountLanguageModel(Generic[Token]):
    """n-gram counts with back-off to shorter contexts.

        p(w | c) = count(c w) / count(c .) for the longest known context c after which w was seen,
        and (count(w) + 1) / (W + V) if there is none

    where W is the number of training tokens and V of distinct ones. This back-off gives no
    discount, so all probabilities sum to more than 1; `mode="interpolated"` sums to 1:

        p_k(w | c) = (count(c w) + V_c p_{k-1}(w | c')) / (count(c .) + V_c)

    with V_c the number of distinct words seen after c, c' the context without its first word, and
    p_0 = 1 / (V + 1): one share for any word never seen.

    Args:
        n: longest window counted, at least 1: contexts have up to n - 1 tokens.
        mode: "backoff" or "interpolated", used by `probability` and `perplexity`.

    Raises:
        ValueError: `n` is below 1 or `mode` is unknown.

    Backends: plain Python.

    Source: Katz 1987 for backing off; Witten and Bell 1991 for the interpolation weights.

    Example:
        >>> model = CountLanguageModel(3)
        >>> model.train("a b c d a b c e".split())
        >>> model.predict("a b".split()), model.probability("d", "a b c".split())
        ('c', 0.5)
    """

    def __init__(self, n: int, *, mode: str = "backoff") -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if mode not in ("backoff", "interpolated"):
            raise ValueError(f"mode must be 'backoff' or 'interpolated', got {mode!r}")
        self.n = n
        self.mode = mode
        self.counts: dict[tuple[Token, ...], Counter[Token]] = {}
        self.totals: dict[tuple[Token, ...], int] = {}

    def train(self, tokens: Sequence[Token]) -> None:
        """Add the counts of all windows of 1 to n tokens; may be called again with more text."""
        tokens = list(tokens)
        for order in range(1, self.n + 1):
            for start in range(len(tokens) - order + 1):
                context = tuple(tokens[start : start + order - 1])
                following = self.counts.setdefault(context, Counter())
                following[tokens[start + order - 1]] += 1
                self.totals[context] = self.totals.get(context, 0) + 1

    def predict(self, context: Sequence[Token] = ()) -> Token | None:
        """Return the likeliest next token, the first seen among equals; None if untrained."""
        for known in self._contexts(context):
            if known in self.counts:
                return self.counts[known].most_common(1)[0][0]
        return None

    def probability(self, token: Token, context: Sequence[Token] = ()) -> float:
        """Return p(token | context), of which at most the last n - 1 tokens matter.

        Raises:
            ValueError: nothing has been counted.
        """
        if not self.counts:
            raise ValueError("the model knows no tokens yet: call train first")
        if self.mode == "interpolated":
            return self._interpolated(token, context)
        for known in self._contexts(context):
            if known and token in self.counts.get(known, ()):
                return self.counts[known][token] / self.totals[known]
        unigrams: Counter[Token] = self.counts.get((), Counter())
        return (unigrams[token] + 1) / max(self.totals.get((), 0) + len(unigrams), 1)

    def perplexity(self, tokens: Sequence[Token], window: int | None = None) -> float:
        """Return exp of the mean -log p of each token after at most `window` preceding ones.

        Args:
            tokens: the text; an empty one gives infinity.
            window: n by default.
        """
        tokens = list(tokens)
        window = self.n if window is None else window
        if not tokens:
            return math.inf
        log_sum = 0.0
        for i, token in enumerate(tokens):
            log_sum -= math.log(self.probability(token, tokens[max(0, i - window) : i]))
        return math.exp(log_sum / len(tokens))

    def generate(self, context: Sequence[Token], max_new_tokens: int) -> list[Token]:
        """Return the context and up to `max_new_tokens` likeliest tokens after it."""
        out = list(context)
        for _ in range(max_new_tokens):
            token = self.predict(out)
            if token is None:
                break
            out.append(token)
        return out

    def _contexts(self, context: Sequence[Token]) -> list[tuple[Token, ...]]:
        """Return the last n - 1, n - 2, ... 0 tokens, orders longer than the context left out."""
        longest = min(self.n - 1, len(context))
        # len - k and not -k: a slice from -0 would be the whole context.
        return [tuple(context[len(context) - k :]) for k in range(longest, -1, -1)]

    def _interpolated(self, token: Token, context: Sequence[Token]) -> float:
        p = 1.0 / (len(self.counts.get((), ())) + 1)
        for known in reversed(self._contexts(context)):
            following = self.counts.get(known)
            if following is None:
                break
            distinct = len(following)
            p = (following[token] + distinct * p) / (self.totals[known] + distinct)
        return p
