"""Encoding and decoding: the half of BPETokenizer that works on text and ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from .backend import default_threads
from .call_arguments import check_text, checked_ids, checked_special, checked_texts
from .dropout import check_dropout, first_state, piece_ends
from .invalid import encode_invalid
from .model import Model
from .patterns import scanner_code, splitter
from .reference import Specials, sound_text, to_bytes
from .spans import character_spans
from .streaming import Appender, StreamDecoder
from .training_arguments import checked_threads, whole

Special = Literal["all"] | Collection[str]


class Allowed(NamedTuple):
    """The special tokens one call may match, and the engine's matcher of them."""

    tokens: list[tuple[bytes, int]]
    matcher: Any


class Coding:
    """What BPETokenizer does with text and ids; see there."""

    __slots__ = ()

    _model: Model
    _engine: Any
    _encode_text: Any
    _all_specials: Allowed
    _no_specials: Allowed

    @property
    def model(self) -> Model:
        """The data of this tokenizer."""
        return self._model

    @property
    def _encoder(self) -> Any:
        raise NotImplementedError

    @property
    def _decoder(self) -> Any:
        raise NotImplementedError

    def _allowed(
        self, text: str | bytes, allowed: Special | None, disallowed: Special | None
    ) -> Allowed:
        """The special tokens one call may match; raises on a disallowed one in the text."""
        specials = self._model.special_tokens
        if allowed is None and disallowed is None:
            return self._all_specials
        allowed = checked_special("allowed_special", allowed)
        disallowed = checked_special("disallowed_special", disallowed)
        wanted = set(specials) if allowed == "all" else set(allowed or ())
        unknown = wanted - set(specials)
        if unknown:
            raise ValueError(f"allowed_special holds {sorted(unknown)[0]!r}, which is not special")
        forbidden = (
            set(specials) - wanted
            if disallowed is None or disallowed == "all"
            else set(disallowed) - wanted
        )
        if forbidden:
            searched = text if isinstance(text, str) else text.decode("utf-8", "replace")
            for token in sorted(forbidden):
                if token in searched:
                    raise ValueError(
                        f"text holds the special token {token!r} as plain text. Pass "
                        f"allowed_special={{{token!r}, ...}} to encode it as one token, "
                        f"disallowed_special=() to encode it as ordinary text, or remove it"
                    )
        if len(wanted) in (0, len(specials)):
            return self._all_specials if wanted else self._no_specials
        tokens = [(t.encode(), specials[t]) for t in sorted(wanted)]
        return Allowed(tokens, self._engine.Specials(tokens))

    def encode(
        self,
        text: str | bytes,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: str or bytes. Lone surrogates count as U+FFFD; bytes need not be UTF-8.
            allowed_special: special tokens that become their id: a collection or "all".
            disallowed_special: special tokens whose presence raises: a collection or "all".
                With neither argument every special token in the text becomes its id. With either,
                the rules are tiktoken's: nothing is allowed and all others are disallowed unless
                said so, and those neither allowed nor disallowed are ordinary text.
            dropout: probability of leaving out each possible merge (BPE-dropout), in [0, 1].
            seed: of the dropout, an int of which 64 bits count; the same seed gives the same ids
                on every backend. None: a new one each time.

        Returns:
            List of int.

        Raises:
            TypeError: an argument is of the wrong type; names it.
            ValueError: dropout is not in [0, 1], or a disallowed special token is in the text.

        Example:
            >>> from lmfast import BPETokenizer
            >>> t = BPETokenizer.train(["ab ab ab"], 258)
            >>> t.encode("ab ab")
            [256, 257]
        """
        plain = allowed_special is None and disallowed_special is None and seed is None
        if plain and type(dropout) is float and not dropout:
            quick = self._encode_text
            if quick is not None and (ids := quick(text)) is not NotImplemented:
                return ids
        check_text(text)
        check_dropout(dropout)
        state = first_state(seed)
        specials = self._allowed(text, allowed_special, disallowed_special)
        if dropout:
            return self._encode_with_dropout(text, specials, float(dropout), state)
        ids = self._encode_by_python(text, specials)
        return self._encoder.encode(text, specials.matcher) if ids is None else ids

    def encode_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
    ) -> np.ndarray:
        """As `encode`, as an int32 array: no Python object per token."""
        check_text(text)
        specials = self._allowed(text, allowed_special, disallowed_special)
        ids = self._encode_by_python(text, specials)
        if ids is not None:
            return np.array(ids, dtype=np.int32)
        return self._encoder.encode_array(text, specials.matcher)

    def count(
        self,
        text: str | bytes,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
    ) -> int:
        """The number of tokens of a text, without making the ids."""
        check_text(text)
        specials = self._allowed(text, allowed_special, disallowed_special)
        ids = self._encode_by_python(text, specials)
        return self._encoder.count(text, specials.matcher) if ids is None else len(ids)

    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        *,
        threads: int | None = None,
        flat: bool = False,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
    ) -> Any:
        """Encode many texts, on several threads and without the GIL.

        Args:
            texts: the texts.
            threads: None takes all CPUs of the process. The ids do not depend on it.
            flat: return (ids, offsets), text i being ids[offsets[i]:offsets[i + 1]].
            allowed_special, disallowed_special: as for `encode`.

        Returns:
            List of int32 arrays, or with ``flat`` an int32 and an int64 array.
        """
        texts = checked_texts(texts)
        threads = checked_threads(threads)
        allowed_special = checked_special("allowed_special", allowed_special)
        disallowed_special = checked_special("disallowed_special", disallowed_special)
        specials = self._allowed("", allowed_special, disallowed_special)
        if disallowed_special is not None or allowed_special is not None:
            for text in texts:
                self._allowed(text, allowed_special, disallowed_special)
        damaged = self._model.mode == "byte" and any(
            self._engine.valid_prefix(text) < len(text) for text in texts if isinstance(text, bytes)
        )
        if damaged or scanner_code(self._model.pattern) is None:
            rows = []
            for text in texts:
                row = self._encode_by_python(text, specials)
                rows.append(self._encoder.encode(text, specials.matcher) if row is None else row)
            ids = np.array([id for row in rows for id in row], dtype=np.int32)
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        else:
            count = threads or default_threads()
            ids, offsets = self._encoder.encode_batch(texts, specials.matcher, count)
        if flat:
            return ids, offsets
        bounds = offsets.tolist()
        return [ids[a:b] for a, b in pairwise(bounds)]

    def _encode_with_dropout(
        self, text: str | bytes, specials: Allowed, dropout: float, state: int
    ) -> list[int]:
        sound = isinstance(text, str) or self._engine.valid_prefix(text) == len(text)
        if sound and scanner_code(self._model.pattern) is not None:
            return self._encoder.encode_dropout(text, specials.matcher, None, dropout, state)[0]
        ids: list[int] = []
        for part, special in Specials(specials.tokens).split(sound_text(text)):
            if special is not None:
                ids.append(special)
                continue
            pieces = [to_bytes(piece) for piece in splitter(self._model.pattern)(part)]
            some, state = self._encoder.encode_dropout(
                b"".join(pieces),
                self._no_specials.matcher,
                np.fromiter(piece_ends(pieces), dtype=np.int64),
                dropout,
                state,
            )
            ids += some
        return ids

    def _encode_by_python(self, text: str | bytes, specials: Allowed) -> list[int] | None:
        """What the engine's scanners do not cover: patterns of the user, and bytes that are not
        UTF-8. None where they do."""
        rest = b""
        if isinstance(text, bytes) and self._model.mode == "byte":
            valid = self._engine.valid_prefix(text)
            text, rest = text[:valid], text[valid:]
        if not rest and scanner_code(self._model.pattern) is not None:
            return None
        *before, (last, _) = Specials(specials.tokens).split(sound_text(text))
        ids: list[int] = []
        for part, special in before:
            ids += self._encode_part(part) if special is None else [special]
        if rest:
            return ids + encode_invalid(
                self._model, last, rest, self._encode_part, self._merge_piece
            )
        return ids + self._encode_part(last)

    def _encode_part(self, text: str) -> list[int]:
        """The ids of text without special tokens."""
        if scanner_code(self._model.pattern) is not None:
            return self._encoder.encode(text, self._no_specials.matcher)
        pieces = [to_bytes(piece) for piece in splitter(self._model.pattern)(text)]
        ends = np.fromiter(piece_ends(pieces), dtype=np.int64)
        return self._encoder.encode(b"".join(pieces), self._no_specials.matcher, ends)

    def _merge_piece(self, piece: bytes) -> list[int]:
        """The ids of bytes taken as one piece."""
        ends = np.array([len(piece)], dtype=np.int64)
        return self._encoder.encode(piece, self._no_specials.matcher, ends)

    def offsets(
        self,
        text: str,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and, for each, the characters it covers.

        Args:
            text: the text.
            allowed_special, disallowed_special: as for `encode`.

        Returns:
            (ids, spans): ``text[start:end]`` of a span holds every character of which the token has
            at least one byte. Tokens that share a character overlap in it.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        allowed_special = checked_special("allowed_special", allowed_special)
        disallowed_special = checked_special("disallowed_special", disallowed_special)
        ids = self.encode_numpy(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )
        allowed = self._allowed(text, allowed_special, disallowed_special)
        return ids.tolist(), character_spans(self._model, text, ids, allowed.tokens)

    def truncate(
        self,
        text: str,
        max_tokens: int,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
    ) -> str:
        """The longest beginning of a text that ends with a token and has at most so many tokens.

        Args:
            text: the text.
            max_tokens: the most tokens, >= 0.
            allowed_special, disallowed_special: as for `encode`.
        """
        max_tokens = whole("max_tokens", max_tokens, 0)
        special = {
            "allowed_special": checked_special("allowed_special", allowed_special),
            "disallowed_special": checked_special("disallowed_special", disallowed_special),
        }
        ids, where = self.offsets(text, **special)
        keep = max_tokens
        while len(ids) > keep > 0:
            end = where[keep - 1][1]
            # A token that ends inside a character would count it for both neighbours.
            if where[keep][0] >= end and self.count(text[:end], **special) <= max_tokens:
                return text[:end]
            keep -= 1
        return text if len(ids) <= max_tokens else ""

    def appender(self, text: str = "") -> Appender:
        """An encoding that grows as text arrives; see `Appender`."""
        return Appender(self, text)

    def decode(
        self, ids: Any, *, errors: str = "replace", skip_special_tokens: bool = False
    ) -> str:
        """The text of ids.

        Args:
            ids: list, array or tensor of ints, one-dimensional.
            errors: for bytes that are not UTF-8: "strict", "replace" or "ignore".
            skip_special_tokens: leave out special tokens.

        Raises:
            ValueError: an id is not in the vocabulary; names it and its place.
            UnicodeDecodeError: the bytes are not UTF-8 and errors is "strict".
        """
        if errors not in ("strict", "replace", "ignore"):
            raise ValueError(f'errors must be "strict", "replace" or "ignore", got {errors!r}')
        ids = self._clean_ids(ids, skip_special_tokens)
        text = self._decoder.decode(ids, errors)
        # In the char mode the marker is the space between words: there is none before the first.
        return text[1:] if self._model.mode == "char" and text[:1] == " " else text

    def decode_bytes(self, ids: Any, *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of ids: as `decode`, for text that need not be UTF-8."""
        raw = self.raw_bytes(self._clean_ids(ids, skip_special_tokens))
        return raw[1:] if self._model.mode == "char" and raw[:1] == b" " else raw

    def raw_bytes(self, ids: Any) -> bytes:
        """The bytes of ids as they stand in the middle of a text: a first marker is a space too."""
        return self._decoder.decode_bytes(self._clean_ids(ids, False))

    def decode_batch(self, batch: Iterable[Any], **options: Any) -> list[str]:
        """`decode` for each of several sequences of ids."""
        return [self.decode(ids, **options) for ids in batch]

    def stream_decoder(self, *, errors: str = "replace") -> StreamDecoder:
        """A decoder for ids that come one by one; see `StreamDecoder`."""
        return StreamDecoder(self, errors=errors)

    def _clean_ids(self, ids: Any, skip: bool) -> Any:
        model = self._model
        return checked_ids(ids, model.size, model.special_tokens, skip=skip)
