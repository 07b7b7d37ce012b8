"""Encoding and decoding: the half of BPETokenizer that works on text and ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from .added_tokens import AddedTokens
from .backend import default_threads
from .batches import framed, with_rows
from .call_arguments import BatchOptions, Special, check_text, checked_special, checked_texts
from .decoding import Decoding
from .dropout import check_dropout, first_state, piece_ends
from .invalid import encode_invalid
from .normalization import is_normal
from .patterns import scanner_code, splitter
from .reference import sound_text, to_bytes
from .spans import character_spans, located_spans
from .streaming import Appender
from .template import NOTHING, Template
from .training_arguments import checked_threads, whole
from .truncation import truncated

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Allowed(NamedTuple):
    """The special tokens one call may match, the engine's matcher of them, and their rules."""

    tokens: list[tuple[bytes, int]]
    matcher: Any
    rules: AddedTokens


class Coding(Decoding):
    """What BPETokenizer does with text and ids; see there."""

    __slots__ = ()

    _engine: Any
    _encode_text: Any
    _all_specials: Allowed
    _no_specials: Allowed
    _scans: bool
    _framed: bool

    @property
    def _encoder(self) -> Any:
        raise NotImplementedError

    def _make_allowed(self, tokens: Mapping[str, int]) -> Allowed:
        model = self._model
        pairs = [(token.encode(), id) for token, id in tokens.items()]
        rules = AddedTokens(tokens, model.token_flags, model.normalizer)
        return Allowed(pairs, self._engine.Specials(pairs), rules)

    def _allowed(
        self, text: str | bytes, allowed: Special | None, disallowed: Special | None
    ) -> Allowed:
        """The special tokens one call may match; raises on a disallowed one in the text."""
        every = self._model.special_tokens
        if allowed is None and disallowed is None:
            return self._all_specials
        allowed = checked_special("allowed_special", allowed)
        disallowed = checked_special("disallowed_special", disallowed)
        specials = set(every) - self._model.ordinary
        wanted = set(specials) if allowed == "all" else set(allowed or ())
        unknown = wanted - set(every)
        if unknown:
            raise ValueError(f"allowed_special holds {sorted(unknown)[0]!r}, which is not special")
        forbidden = (
            specials - wanted
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
        wanted |= self._model.ordinary
        if len(wanted) in (0, len(every)):
            return self._all_specials if wanted else self._no_specials
        return self._make_allowed({token: every[token] for token in sorted(wanted)})

    def _direct(self, text: str | bytes) -> bool:
        """Whether the engine alone encodes a text: there is a scanner for the pattern, its matcher
        finds the special tokens, bytes are UTF-8, and nothing is left to normalize."""
        model = self._model
        if not self._scans:
            return False
        if isinstance(text, bytes) and model.mode == "byte":
            if self._engine.valid_prefix(text) < len(text):
                return False
        if not model.normalizer:
            return True
        sound = sound_text(text)
        return (sound is text or isinstance(text, bytes)) and is_normal(sound, model.normalizer)

    def _around(self, add_special_tokens: bool) -> Template:
        return self._model.template if add_special_tokens else NOTHING

    def encode(
        self,
        text: str | bytes,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
        add_special_tokens: bool = True,
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
            add_special_tokens: put the tokens around the text that the file of a Hugging Face
                tokenizer asks for, such as a begin token. Other tokenizers have none.
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
                return (
                    self._model.template.join(ids) if self._framed and add_special_tokens else ids
                )
        check_text(text)
        check_dropout(dropout)
        state = first_state(seed)
        specials = self._allowed(text, allowed_special, disallowed_special)
        if dropout:
            ids = self._encode_with_dropout(text, specials, float(dropout), state)
        elif self._direct(text):
            ids = self._encoder.encode(text, specials.matcher)
        else:
            ids = self._encode_by_python(text, specials)
        template = self._around(add_special_tokens)
        return ids if template is NOTHING else template.join(ids)

    def encode_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
        add_special_tokens: bool = True,
    ) -> np.ndarray:
        """As `encode`, as an int32 array: no Python object per token."""
        check_text(text)
        specials = self._allowed(text, allowed_special, disallowed_special)
        if self._direct(text):
            ids = self._encoder.encode_array(text, specials.matcher)
        else:
            ids = np.array(self._encode_by_python(text, specials), dtype=np.int32)
        template = self._around(add_special_tokens)
        if template is NOTHING:
            return ids
        before, after = (np.array(part, np.int32) for part in (template.before, template.after))
        return np.concatenate((before, ids, after))

    def count(
        self,
        text: str | bytes,
        *,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
        add_special_tokens: bool = True,
    ) -> int:
        """The number of tokens of a text, without making the ids."""
        check_text(text)
        specials = self._allowed(text, allowed_special, disallowed_special)
        more = len(self._around(add_special_tokens).single) - 1
        if self._direct(text):
            return more + self._encoder.count(text, specials.matcher)
        return more + len(self._encode_by_python(text, specials))

    @overload
    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        *,
        flat: Literal[False] = False,
        **options: Unpack[BatchOptions],
    ) -> list[np.ndarray]: ...

    @overload
    def encode_batch(
        self, texts: Iterable[str | bytes], *, flat: Literal[True], **options: Unpack[BatchOptions]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    @overload
    def encode_batch(
        self, texts: Iterable[str | bytes], *, flat: bool, **options: Unpack[BatchOptions]
    ) -> list[np.ndarray] | tuple[np.ndarray, np.ndarray]: ...

    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        *,
        threads: int | None = None,
        flat: bool = False,
        allowed_special: Special | None = None,
        disallowed_special: Special | None = None,
        add_special_tokens: bool = True,
    ) -> list[np.ndarray] | tuple[np.ndarray, np.ndarray]:
        """Encode many texts, on several threads and without the GIL.

        Args:
            texts: the texts.
            threads: None takes all CPUs of the process. The ids do not depend on it.
            flat: return (ids, offsets), text i being ids[offsets[i]:offsets[i + 1]].
            allowed_special, disallowed_special, add_special_tokens: as for `encode`.

        Returns:
            List of int32 arrays, or with ``flat`` an int32 and an int64 array.

        What the compiled engine does not do alone runs in Python, one text at a time: patterns of
        the user, which the ``regex`` package matches under the GIL, added tokens with rules of
        their own, texts still to be normalized, and bytes that are not UTF-8; the other texts of
        the batch run on all threads all the same.
        """
        texts = checked_texts(texts)
        threads = checked_threads(threads)
        allowed_special = checked_special("allowed_special", allowed_special)
        disallowed_special = checked_special("disallowed_special", disallowed_special)
        specials = self._allowed("", allowed_special, disallowed_special)
        if (allowed_special, disallowed_special) != (None, None):
            for text in texts:
                self._allowed(text, allowed_special, disallowed_special)
        others: dict[int, str | bytes] = {}
        if not self._scans or self._model.normalizer or set(map(type, texts)) != {str}:
            others = {i: text for i, text in enumerate(texts) if not self._direct(text)}
        if others:
            texts = ["" if i in others else text for i, text in enumerate(texts)]
        count = threads or default_threads()
        ids, offsets = self._encoder.encode_batch(texts, specials.matcher, count)
        if others:
            rows = {i: self._encode_by_python(text, specials) for i, text in others.items()}
            ids, offsets = with_rows(ids, offsets, rows)
        template = self._around(add_special_tokens)
        if template is not NOTHING:
            ids, offsets = framed(ids, offsets, template.before, template.after)
        if flat:
            return ids, offsets
        bounds = offsets.tolist()
        return [ids[a:b] for a, b in pairwise(bounds)]

    def _encode_with_dropout(
        self, text: str | bytes, specials: Allowed, dropout: float, state: int
    ) -> list[int]:
        if self._direct(text):
            return self._encoder.encode_dropout(text, specials.matcher, None, dropout, state)[0]
        ids: list[int] = []
        for part in specials.rules.split(sound_text(text)):
            if part.id is not None:
                ids.append(part.id)
                continue
            pieces = [to_bytes(piece) for piece in splitter(self._model.pattern)(part.text)]
            some, state = self._encoder.encode_dropout(
                b"".join(pieces),
                self._no_specials.matcher,
                np.fromiter(piece_ends(pieces), dtype=np.int64),
                dropout,
                state,
            )
            ids += some
        return ids

    def _encode_by_python(self, text: str | bytes, specials: Allowed) -> list[int]:
        """The ids of what the engine does not do alone, see `_direct`."""
        rest = b""
        if isinstance(text, bytes) and self._model.mode == "byte":
            valid = self._engine.valid_prefix(text)
            text, rest = text[:valid], text[valid:]
        *before, last = specials.rules.split(sound_text(text))
        ids: list[int] = []
        for part in before:
            ids += self._encode_part(part.text) if part.id is None else [part.id]
        if rest:
            return ids + encode_invalid(
                self._model, last.text, rest, self._encode_part, self._merge_piece
            )
        return ids + self._encode_part(last.text)

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
        add_special_tokens: bool = True,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text and, for each, the characters it covers.

        Args:
            text: the text.
            allowed_special, disallowed_special, add_special_tokens: as for `encode`. What is added
                has the span (0, 0).

        Returns:
            (ids, spans): ``text[start:end]`` of a span holds every character of which the token has
            at least one byte. Tokens that share a character overlap in it. Characters that a
            normalizer makes into others count as one.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        allowed_special = checked_special("allowed_special", allowed_special)
        disallowed_special = checked_special("disallowed_special", disallowed_special)
        model, allowed = self._model, self._allowed(text, allowed_special, disallowed_special)
        if model.plain_tokens and is_normal(sound_text(text), model.normalizer):
            array = self.encode_numpy(
                text,
                allowed_special=allowed_special,
                disallowed_special=disallowed_special,
                add_special_tokens=False,
            )
            ids, spans = array.tolist(), character_spans(model, text, array, allowed.tokens)
        else:
            ids, spans = located_spans(model, text, allowed.rules, self._encode_part)
        template = self._around(add_special_tokens)
        return (
            template.join(ids),
            [(0, 0)] * len(template.before) + spans + [(0, 0)] * len(template.after),
        )

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
            allowed_special, disallowed_special: as for `encode`; the tokens that `encode` puts
                around a text are not counted.

        With a named pattern the time is in proportion to what is kept, not to the text.
        """
        max_tokens = whole("max_tokens", max_tokens, 0)
        special: dict[str, Any] = {
            "allowed_special": checked_special("allowed_special", allowed_special),
            "disallowed_special": checked_special("disallowed_special", disallowed_special),
            "add_special_tokens": False,
        }
        self._allowed(text, special["allowed_special"], special["disallowed_special"])
        return truncated(self, text, max_tokens, special)

    def appender(self, text: str = "") -> Appender:
        """An encoding that grows as text arrives; see `Appender`."""
        return Appender(self, text)
