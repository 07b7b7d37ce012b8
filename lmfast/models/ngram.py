"""A language model that counts: the longest context seen before decides."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from lmfast.tokenizer.formats import read_json, write_json
from lmfast.tokenizer.training_arguments import whole

Token = TypeVar("Token")

_FORMAT = "lmfast.CountLanguageModel"


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

    Tokens are anything hashable: words, characters (a str is a sequence of them), ids, also
    those of a tensor or an array of one dimension.

    Raises:
        TypeError: `n` is no int.
        ValueError: `n` is below 1 or `mode` is unknown.

    Backends: plain Python.

    Source: Katz 1987 for backing off; Witten and Bell 1991 for the interpolation weights.

    Example:
        >>> model = CountLanguageModel(3)
        >>> model.train("a b c d a b c e".split())
        >>> model.predict("a b".split()), model.probability("d", "a b c".split())
        ('c', 0.5)
        >>> model
        CountLanguageModel(n=3, mode='backoff', 8 tokens, 5 distinct, 9 contexts)
    """

    def __init__(self, n: int, *, mode: str = "backoff") -> None:
        n = whole("n", n, 1)
        if mode not in ("backoff", "interpolated"):
            raise ValueError(f"mode must be 'backoff' or 'interpolated', got {mode!r}")
        self.n = n
        self.mode = mode
        self.counts: dict[tuple[Token, ...], Counter[Token]] = {}
        self.totals: dict[tuple[Token, ...], int] = {}

    def train(self, tokens: Iterable[Token]) -> None:
        """Add the counts of all windows of 1 to n tokens.

        May be called again with more text, of which no window reaches into what was there before.

        Args:
            tokens: one text.

        Raises:
            TypeError: `tokens` is no sequence, or holds what cannot be hashed: several texts.
        """
        tokens = _listed("tokens", tokens)
        for order in range(1, self.n + 1):
            for start in range(len(tokens) - order + 1):
                context = tuple(tokens[start : start + order - 1])
                following = self.counts.setdefault(context, Counter())
                following[tokens[start + order - 1]] += 1
                self.totals[context] = self.totals.get(context, 0) + 1

    def predict(self, context: Sequence[Token] = ()) -> Token | None:
        """Return the token seen most often after the longest known end of the context.

        Args:
            context: any number of tokens, of which at most the last n - 1 matter.

        Returns:
            The first seen among equals, in both modes; None if nothing has been counted.

        Raises:
            TypeError: `context` is no sequence of tokens.
        """
        for known in self._contexts(context):
            if known in self.counts:
                return self.counts[known].most_common(1)[0][0]
        return None

    def probability(self, token: Token, context: Sequence[Token] = ()) -> float:
        """Return p(token | context), of which at most the last n - 1 tokens matter.

        Raises:
            TypeError: `token` or a token of `context` cannot be hashed.
            ValueError: nothing has been counted.
        """
        if not self.counts:
            raise ValueError("the model knows no tokens yet: call train first")
        if isinstance(token, (Tensor, np.ndarray)) and token.ndim == 0:
            token = token.item()  # type: ignore[assignment]
        if not isinstance(token, Hashable) or isinstance(token, Tensor):
            raise TypeError(f"token must be one token, got {token!r}")
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
            window: n by default, and more than n - 1 changes nothing; 0: each token by itself.

        Raises:
            TypeError: `tokens` is no sequence of tokens, `window` no int.
            ValueError: `window` is negative, or nothing has been counted.
        """
        tokens = _listed("tokens", tokens)
        window = self.n if window is None else whole("window", window, 0)
        if not tokens:
            return math.inf
        log_sum = 0.0
        for i, token in enumerate(tokens):
            log_sum -= math.log(self.probability(token, tokens[max(0, i - window) : i]))
        return math.exp(log_sum / len(tokens))

    def generate(self, context: Sequence[Token], max_new_tokens: int) -> list[Token]:
        """Return the context and the tokens that `predict` puts after it, one after the other.

        Args:
            context: any number of tokens, also none.
            max_new_tokens: at least 0; fewer come only if nothing has been counted.

        Raises:
            TypeError: `context` is no sequence of tokens, `max_new_tokens` no int.
            ValueError: `max_new_tokens` is negative.
        """
        out = _listed("context", context)
        for _ in range(whole("max_new_tokens", max_new_tokens, 0)):
            token = self.predict(out)
            if token is None:
                break
            out.append(token)
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as one JSON file, without pickle; tokens must be str or int.

        Raises:
            TypeError: a token is neither str nor int.
            OSError: the file cannot be written.
        """
        ids = {token: i for i, token in enumerate(self.counts.get((), ()))}
        for token in ids:
            if type(token) not in (str, int):
                raise TypeError(f"save writes tokens of type str and int, got {token!r}")
        contexts = [
            [[ids[t] for t in known], [ids[t] for t in following], list(following.values())]
            for known, following in self.counts.items()
        ]
        content = {"n": self.n, "mode": self.mode, "tokens": list(ids), "contexts": contexts}
        write_json({"format": _FORMAT, "version": 1, **content}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CountLanguageModel[Any]:
        """Read what `save` wrote; the order of tokens, which decides among equals, is kept.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged or something else.

        Example:
            >>> model = CountLanguageModel(2)
            >>> model.train("to be or not to be".split())
            >>> model.save("counts.json")
            >>> CountLanguageModel.load("counts.json").predict(["to"])
            'be'
        """
        content, name = read_json(path), os.fspath(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{name} was not written by CountLanguageModel.save")
        if content.get("version") != 1:
            raise ValueError(f"{name} has version {content.get('version')}, this lmfast reads 1")
        try:
            model: CountLanguageModel[Any] = cls(content["n"], mode=content["mode"])
            tokens = content["tokens"]
            for known, following, counts in content["contexts"]:
                context = tuple(tokens[i] for i in known)
                pairs = zip(following, counts, strict=True)
                seen = Counter({tokens[i]: whole("a count", c, 1) for i, c in pairs})
                model.counts[context], model.totals[context] = seen, sum(seen.values())
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is damaged: {error}") from None
        return model

    def __repr__(self) -> str:
        return (
            f"CountLanguageModel(n={self.n}, mode={self.mode!r}, {self.totals.get((), 0)} tokens, "
            f"{len(self.counts.get((), ()))} distinct, {len(self.counts)} contexts)"
        )

    def _contexts(self, context: Sequence[Token]) -> list[tuple[Token, ...]]:
        """Return the last n - 1, n - 2, ... 0 tokens, orders longer than the context left out."""
        # No more than matters is listed: a text may be long, and is asked for at each token.
        several = hasattr(context, "__getitem__") and getattr(context, "ndim", 1) == 1
        tail = context[-self.n :] if several else context
        context = _listed("context", tail)
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


def _listed(name: str, tokens: Iterable[Token]) -> list[Token]:
    """The tokens as Python's own objects: a tensor's elements equal nothing but themselves."""
    if isinstance(tokens, (Tensor, np.ndarray)):
        if tokens.ndim != 1:
            raise TypeError(f"{name} must have one dimension, got shape {tuple(tokens.shape)}")
        return tokens.tolist()
    try:
        listed = list(tokens)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of tokens, got {tokens!r}") from None
    try:
        set(listed)
    except TypeError as error:
        raise TypeError(
            f"{name} must be one text, a sequence of tokens that can be hashed: {error} "
            "(several texts: call train once for each)"
        ) from None
    return listed
