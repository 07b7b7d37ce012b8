"""The immutable data of a tokenizer, checked once: everything an engine needs and a file holds."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np

from .added_tokens import FLAGS, is_plain
from .cuts import pairs_inside
from .normalization import FORMS
from .patterns import Pattern, canonical_pattern, scanner_code, splitter
from .template import Template, template_of

MODES = ("byte", "char")
ID_LIMIT = 1 << 21


@dataclass(frozen=True)
class Model:
    """Tokens, merges and rules of one tokenizer.

    Args:
        mode: "byte" (every text is encodable) or "char" (words of known characters).
        pattern: name of a pattern or a regular expression; None: a text is one piece; several: each
            splits the pieces of the one before.
        tokens: id -> bytes (UTF-8 in the char mode). None marks an id that has no text of its own:
            a special token or a gap.
        merges: (n, 4) int64 array of left id, right id, new id and rank, ascending by rank.
        special_tokens: text -> id; matched before splitting, never merged.
        whole_piece: a piece that is a token becomes that token, whatever the merges say.
        marker: what stands before each word (char mode).
        unk: the special token of unknown characters (char mode).
        token_flags: text of a special token -> some of `added_tokens.FLAGS`, where it has any.
        normalizer: forms of Unicode normalization, applied in order before splitting (byte mode).
        post_processor: what stands around a text, as the JSON text of a Hugging Face
            post-processor; None: nothing.
    """

    mode: str
    pattern: Pattern
    tokens: tuple[bytes | None, ...]
    merges: np.ndarray
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    whole_piece: bool = False
    marker: str = ""
    unk: str | None = None
    token_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    normalizer: tuple[str, ...] = ()
    post_processor: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if not isinstance(self.marker, str) or _has_surrogates(self.marker):
            raise ValueError(f"the marker must be text without surrogates, got {self.marker!r}")
        if not isinstance(self.unk, (str, type(None))):
            raise ValueError(f"the unknown token must be a str or None, got {self.unk!r}")
        object.__setattr__(self, "pattern", canonical_pattern(self.pattern))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "special_tokens", MappingProxyType(dict(self.special_tokens)))
        flags = {text: tuple(given) for text, given in self.token_flags.items() if given}
        object.__setattr__(self, "token_flags", MappingProxyType(flags))
        object.__setattr__(self, "normalizer", tuple(self.normalizer))
        merges = np.array(self.merges, dtype=np.int64, order="C").reshape(-1, 4)
        merges.flags.writeable = False
        object.__setattr__(self, "merges", merges)
        self._check_pattern()
        self._check_tokens()
        self._check_specials()
        self._check_merges()
        self._check_additions()

    @classmethod
    def trusted(cls, **fields: Any) -> Model:
        """A model of fields that are known to fit together; the checks cost more than training."""
        model = object.__new__(cls)
        model.__dict__.update(fields)
        model.__dict__["special_tokens"] = MappingProxyType(dict(model.special_tokens))
        model.__dict__["token_flags"] = MappingProxyType({})
        model.merges.flags.writeable = False
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("special_tokens", "token_flags"):
            values[name] = dict(values[name])
        return _restore, (values,)

    @functools.cached_property
    def ids(self) -> Mapping[bytes, int]:
        """Token -> id."""
        known = {token: id for id, token in enumerate(self.tokens) if token is not None}
        return MappingProxyType(known)

    def _check_pattern(self) -> None:
        if self.pattern is None or scanner_code(self.pattern) is not None:
            return
        if _has_surrogates("".join(self.pattern)):
            raise ValueError(f"the pattern {self.pattern!r} holds surrogates")
        try:
            splitter(self.pattern)
        except ImportError:
            pass  # Decoding needs no pattern; encoding says what is missing.

    def _check_tokens(self) -> None:
        if len(self.tokens) >= ID_LIMIT:
            raise ValueError(f"a vocabulary holds at most 2097151 ids, got {len(self.tokens)}")
        seen: dict[bytes, int] = {}
        for id, token in enumerate(self.tokens):
            if token is None:
                continue
            if not token:
                raise ValueError(f"token {id} is empty")
            if token in seen:
                raise ValueError(f"token {token!r} has two ids, {seen[token]} and {id}")
            seen[token] = id
        if self.mode == "byte":
            texts = {t.encode("utf-8", "replace") for t in self.special_tokens if type(t) is str}
            missing = [b for b in range(256) if bytes([b]) not in seen and bytes([b]) not in texts]
            if missing:
                raise ValueError(f"the byte {missing[0]:#04x} is not in the vocabulary")
            if self.unk is not None:
                raise ValueError(f"the byte mode knows every text: unk must be None, {self.unk!r}")
            return
        if self.pattern not in ("words", "lines"):
            raise ValueError(f"the char mode splits by words or lines, got {self.pattern!r}")
        for token, id in seen.items():
            try:
                token.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"token {id}, {token!r}, is not UTF-8: {error}") from error
        if len(self.marker) != 1 or self.marker.encode() not in seen:
            raise ValueError(f"the marker {self.marker!r} is not a character of the vocabulary")

    def _check_specials(self) -> None:
        owner: dict[int, str] = {}
        for text, id in self.special_tokens.items():
            if not isinstance(text, str) or not text:
                raise ValueError(f"a special token must be a non-empty str, got {text!r}")
            if _has_surrogates(text):
                raise ValueError(f"the special token {text!r} holds surrogates")
            check_id(id, f"the id of the special token {text!r}")
            if not 0 <= id < len(self.tokens):
                raise ValueError(f"special token {text!r} has id {id}, outside the vocabulary")
            if id in owner:
                raise ValueError(f"special tokens {owner[id]!r} and {text!r} share the id {id}")
            owner[id] = text
        for id, text in owner.items():
            if self.tokens[id] not in (None, text.encode()):
                raise ValueError(
                    f"special token {text!r} has the id {id} of the token {self.tokens[id]!r}"
                )
        if self.mode == "char" and self.unk not in self.special_tokens:
            raise ValueError(f"the char mode needs a special token for unknown, got {self.unk!r}")

    def _check_merges(self) -> None:
        tokens, size = self.tokens, len(self.tokens)
        special = {id: text.encode() for text, id in self.special_tokens.items()}
        pairs: set[tuple[int, int]] = set()
        previous = None
        for index, (left, right, new, rank) in enumerate(self.merges.tolist()):
            name = f"merge {index} ({left}, {right}) -> {new}"
            if not (0 <= left < size and 0 <= right < size and 0 <= new < size):
                raise ValueError(f"{name} has an id outside the vocabulary of {size}")
            parts = (tokens[left] or special.get(left), tokens[right] or special.get(right))
            if parts[0] is None or parts[1] is None:
                raise ValueError(f"{name} joins an id that has no text")
            if (tokens[new] or special.get(new)) != parts[0] + parts[1]:
                raise ValueError(f"{name}: {parts[0]!r} and {parts[1]!r} do not make the new token")
            if (left, right) in pairs:
                raise ValueError(f"{name} repeats an earlier pair")
            if previous is not None and rank < previous:
                raise ValueError(f"{name} is out of rank order")
            pairs.add((left, right))
            previous = rank

    def _check_additions(self) -> None:
        for text, flags in self.token_flags.items():
            if text not in self.special_tokens:
                raise ValueError(f"token_flags names {text!r}, which is not a special token")
            unknown = set(flags) - set(FLAGS)
            if unknown:
                raise ValueError(f"the token {text!r} has the unknown flag {min(unknown)!r}")
        unknown = set(self.normalizer) - set(FORMS)
        if unknown:
            raise ValueError(f"the normalizer must be of {FORMS}, got {sorted(unknown)[0]!r}")
        if self.mode == "char" and (self.normalizer or self.token_flags):
            raise ValueError("the char mode has no normalizer and no token flags")
        template = self.template
        for id in (*template.single, *template.pair):
            if isinstance(id, int) and not 0 <= id < len(self.tokens):
                raise ValueError(f"the post_processor adds the id {id}, outside the vocabulary")

    @property
    def template(self) -> Template:
        """What stands around a text."""
        return template_of(self.post_processor)

    @functools.cached_property
    def ordinary(self) -> frozenset[str]:
        """The added tokens that are text like any other: matched always, never left out."""
        return frozenset(t for t, flags in self.token_flags.items() if "ordinary" in flags)

    @functools.cached_property
    def plain_tokens(self) -> bool:
        """Whether the engine's matcher finds the special tokens of a text that is normalized."""
        return is_plain(self.special_tokens, self.token_flags, self.normalizer)

    @functools.cached_property
    def has_certain_ends(self) -> bool:
        """Whether a text can be encoded in parts that `cuts.safe_cut` gives."""
        late = any("normalized" in flags for flags in self.token_flags.values())
        return self.plain_tokens and not (late and self.normalizer)

    @functools.cached_property
    def joined_pairs(self) -> frozenset[str]:
        """The pairs of characters inside special tokens, between which no text is cut."""
        return pairs_inside(self.special_tokens)

    @functools.cached_property
    def left_out(self) -> frozenset[int]:
        """The ids that ``skip_special_tokens`` leaves out."""
        return frozenset(id for t, id in self.special_tokens.items() if t not in self.ordinary)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return len(self.tokens)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each id, special tokens included."""
        lengths = np.array([len(token or b"") for token in self.tokens], dtype=np.int64)
        for text, id in self.special_tokens.items():
            lengths[id] = len(text.encode())
        return lengths

    @functools.cached_property
    def char_lengths(self) -> np.ndarray:
        """Characters of each id (char mode), the marker included."""
        return np.array([len((t or b"").decode("utf-8", "replace")) for t in self.tokens])

    @functools.cached_property
    def rank_table(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(left, right) -> (rank, new id)."""
        return {(a, b): (rank, new) for a, b, new, rank in self.merges.tolist()}

    def symbols(self) -> dict[int, int]:
        """Byte value or code point -> id of the symbols that merging starts from."""
        if self.mode == "byte":
            own = {text.encode(): id for text, id in self.special_tokens.items()}
            return {b: self.ids.get(bytes([b]), own.get(bytes([b]), -1)) for b in range(256)}
        made = set(self.merges[:, 2].tolist())
        found = {}
        for token, id in self.ids.items():
            text = token.decode("utf-8", "replace")
            if len(text) == 1 and id not in made:
                found[ord(text)] = id
        return found

    def text_of(self, id: int) -> bytes | None:
        """The bytes of a token, special ones included; None for an id without a meaning."""
        token = self.tokens[id]
        if token is not None:
            return token
        return next((t.encode() for t, i in self.special_tokens.items() if i == id), None)


def _restore(values: dict[str, Any]) -> Model:
    return Model(**values)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def check_id(id: Any, name: str) -> None:
    """ValueError with the name of an id that is no int or beyond every vocabulary."""
    if type(id) is int and 0 <= id < ID_LIMIT:
        return
    # Python refuses to print integers of thousands of digits.
    shown = "a huge number" if type(id) is int and abs(id) >> 64 else repr(id)
    raise ValueError(f"{name} must be an int in [0, 2^21), got {shown}")


def make_merges(pairs: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """(left, right, new) triples in order -> the merges array of a Model."""
    merges = np.empty((len(pairs), 4), dtype=np.int64)
    if len(pairs):
        merges[:, :3] = pairs
    merges[:, 3] = np.arange(len(pairs))
    return merges
