"""Reading and writing tokenizers: own JSON, GPT-2's two files, .tiktoken ranks."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .byte_alphabet import from_stand_ins
from .model import Model, check_id, make_merges
from .patterns import Pattern

FORMAT, VERSION = "lmfast-bpe", 1
_FIELDS: dict[str, Any] = {
    "mode": str,
    "pattern": (str, list, type(None)),
    "tokens": list,
    "merges": list,
    "special_tokens": dict,
    "whole_piece": bool,
    "marker": str,
    "unk": (str, type(None)),
    "token_flags": dict,
    "normalizer": list,
    "post_processor": (dict, type(None)),
}
# What files without them mean; others must have every entry.
_DEFAULTS: dict[str, Any] = {"token_flags": {}, "normalizer": [], "post_processor": None}


def to_document(model: Model) -> dict[str, Any]:
    """The model as plain JSON values; tokens that are UTF-8 as text, others as base64."""
    tokens: list[Any] = []
    for token in model.tokens:
        if token is None:
            tokens.append(None)
            continue
        try:
            tokens.append(token.decode())
        except UnicodeDecodeError:
            tokens.append({"base64": base64.b64encode(token).decode()})
    return {
        "format": FORMAT,
        "version": VERSION,
        "mode": model.mode,
        "pattern": list(model.pattern) if isinstance(model.pattern, tuple) else model.pattern,
        "marker": model.marker,
        "unk": model.unk,
        "whole_piece": model.whole_piece,
        "special_tokens": dict(model.special_tokens),
        "token_flags": {text: list(flags) for text, flags in model.token_flags.items()},
        "normalizer": list(model.normalizer),
        "post_processor": json.loads(model.post_processor or "null"),
        "tokens": tokens,
        "merges": model.merges.tolist(),
    }


def from_document(document: Any, name: str = "tokenizer") -> Model:
    """The model of a document; ValueError naming the entry that is wrong."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{name}: not an lmfast tokenizer, its format must be {FORMAT!r}")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise ValueError(f"{name}: version {document.get('version')!r} is not {VERSION}")
    document = {**_DEFAULTS, **document}
    for key, kind in _FIELDS.items():
        if key not in document:
            raise ValueError(f"{name}: the entry {key!r} is missing")
        if not isinstance(document[key], kind):
            raise ValueError(f"{name}: {key!r} is a {type(document[key]).__name__}")
    tokens = [_token(t, f"{name}: tokens[{i}]") for i, t in enumerate(document["tokens"])]
    for i, row in enumerate(document["merges"]):
        if not isinstance(row, list) or len(row) != 4 or any(type(v) is not int for v in row):
            raise ValueError(f"{name}: merges[{i}] must be [left, right, new, rank], got {row!r}")
        if any(abs(v) > 1 << 40 for v in row):
            raise ValueError(f"{name}: merges[{i}] is out of range: {row!r}")
    processor = document["post_processor"]
    try:
        return Model(
            mode=document["mode"],
            pattern=document["pattern"],
            tokens=tuple(tokens),
            merges=np.array(document["merges"], dtype=np.int64).reshape(-1, 4),
            special_tokens=document["special_tokens"],
            whole_piece=document["whole_piece"],
            marker=document["marker"],
            unk=document["unk"],
            token_flags=document["token_flags"],
            normalizer=document["normalizer"],
            post_processor=processor and json.dumps(processor, ensure_ascii=False),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _token(value: Any, name: str) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: {value!r} holds surrogates") from error
    if isinstance(value, dict) and isinstance(value.get("base64"), str):
        return _base64(value["base64"], name)
    raise ValueError(f"{name} must be text, base64 or null, got {value!r}")


def _base64(text: str | bytes, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: {text!r} is not base64: {error}") from error


def save_json(model: Model, path: str | os.PathLike) -> None:
    """Write a model, see `write_json`."""
    write_json(to_document(model), path)


def write_json(content: Any, path: str | os.PathLike) -> None:
    """Write a JSON file, UTF-8 and without blanks; a reader never sees a half-written file."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, separators=(",", ":"))
        os.replace(temporary, path)
    except OSError as error:  # of the file asked for, not of the one beside it
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file's content; ValueError naming the file if it is damaged."""
    with open(path, "rb") as file:
        return parse_json(file.read(), os.fspath(path))


def parse_json(content: str | bytes, name: str) -> Any:
    """The value of a JSON text; ValueError with its name if it is damaged or repeats a key."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of many digits
        raise ValueError(f"{name}: not a JSON file: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return made


def load_json(path: str | os.PathLike) -> Model:
    """Read what `save_json` wrote."""
    return from_document(read_json(path), os.fspath(path))


def checked_size(vocab: Mapping[str, Any], specials: Mapping[str, Any], name: str) -> int:
    """One more than the largest id; ValueError where an id is wrong or taken."""
    owner: dict[int, str] = {}
    for token, id in vocab.items():
        check_id(id, f"{name}: the id of {token!r}")
        if id in owner:
            raise ValueError(f"{name}: {owner[id]!r} and {token!r} have the same id {id}")
        owner[id] = token
    for token, id in specials.items():
        check_id(id, f"{name}: the id of the special token {token!r}")
        if vocab.get(token, id) != id:
            raise ValueError(f"{name}: {token!r} has the id {vocab[token]} and, as special, {id}")
    return 1 + max([*vocab.values(), *specials.values()], default=-1)


def pairs_to_model(
    vocab: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]],
    *,
    pattern: Pattern,
    special_tokens: Mapping[str, int] | None,
    name: str,
    **options: Any,
) -> Model:
    """A byte-level model from tokens in stand-in characters and pairs of them; options are other
    fields of the model."""
    size = checked_size(vocab, special_tokens or {}, name)
    triples = []
    made = set()
    for index, (left, right) in enumerate(pairs):
        for part in (left, right, left + right):
            if part not in vocab:
                raise ValueError(
                    f"{name}: merge {index} ({left!r}, {right!r}) needs the token {part!r}, "
                    "which is not in the vocabulary"
                )
        triples.append((vocab[left], vocab[right], vocab[left + right]))
        made.add(left + right)
    specials = dict(special_tokens or {})
    tokens: list[bytes | None] = [None] * size
    for token, id in vocab.items():
        if token in specials:
            continue
        if special_tokens is None and len(token) > 1 and token not in made:
            specials[token] = id
            continue
        try:
            tokens[id] = from_stand_ins(token)
        except KeyError as error:
            raise ValueError(
                f"{name}: the token {token!r} holds {error.args[0]!r}, which stands for no byte"
            ) from None
    try:
        return Model(
            mode="byte",
            pattern=pattern,
            tokens=tuple(tokens),
            merges=make_merges(triples),
            special_tokens=specials,
            **options,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_merge_lines(text: str, name: str) -> list[tuple[str, str]]:
    """Pairs of a merges file; "#version" lines and empty ones are skipped."""
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{name}: line {number} must be two tokens, got {line!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


def read_gpt2(
    encoder_json: str | os.PathLike,
    vocab_bpe: str | os.PathLike,
    pattern: str | None,
    special_tokens: Sequence[str] | None,
) -> Model:
    """GPT-2's vocabulary and merges."""
    vocab = read_json(encoder_json)
    if not isinstance(vocab, dict):
        raise ValueError(f"{os.fspath(encoder_json)}: must hold an object of token -> id")
    try:
        with open(vocab_bpe, encoding="utf-8-sig") as file:
            pairs = read_merge_lines(file.read(), os.fspath(vocab_bpe))
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(vocab_bpe)}: not UTF-8: {error}") from error
    named = None
    if special_tokens is not None:
        missing = [t for t in special_tokens if t not in vocab]
        if missing:
            raise ValueError(f"special_tokens: {missing[0]!r} is not in {os.fspath(encoder_json)}")
        named = {t: vocab[t] for t in special_tokens}
    return pairs_to_model(
        vocab, pairs, pattern=pattern, special_tokens=named, name=os.fspath(encoder_json)
    )


def read_tiktoken(
    ranks: str | os.PathLike | Mapping[bytes, int],
    pattern: str | None,
    special_tokens: Mapping[str, int] | None,
) -> Model:
    """Ranks as tiktoken keeps them: a token's rank is its id, and a pair ranks by what it makes.

    So every way to cut a token into two tokens is a merge of that token's rank.
    """
    if isinstance(ranks, Mapping):
        name, table = "ranks", dict(ranks)
    else:
        name, table = os.fspath(ranks), {}
        with open(ranks, "rb") as file:
            for number, line in enumerate(file, 1):
                parts = line.split()
                if not parts:
                    continue
                if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 20:
                    raise ValueError(f"{name}: line {number} must be base64 and a rank: {line!r}")
                token = _base64(parts[0], f"{name}: line {number}")
                if token in table:
                    raise ValueError(f"{name}: line {number} repeats the token {token!r}")
                table[token] = int(parts[1])
    for token, id in table.items():
        if not isinstance(token, bytes) or not token:
            raise ValueError(f"{name}: a token must be non-empty bytes, got {token!r}")
        check_id(id, f"{name}: the rank of {token!r}")
    specials = dict(special_tokens or {})
    for text, id in specials.items():
        check_id(id, f"the id of the special token {text!r}")
    tokens: list[bytes | None] = [None] * (
        1 + max([*table.values(), *specials.values()], default=-1)
    )
    for token, id in table.items():
        if tokens[id] is not None:
            raise ValueError(f"{name}: {tokens[id]!r} and {token!r} have the same rank {id}")
        tokens[id] = token
    merges = [
        (table[token[:cut]], table[token[cut:]], id, id)
        for token, id in sorted(table.items(), key=lambda item: item[1])
        for cut in range(1, len(token))
        if token[:cut] in table and token[cut:] in table
    ]
    try:
        return Model(
            mode="byte",
            pattern=pattern,
            tokens=tuple(tokens),
            merges=np.array(merges, dtype=np.int64).reshape(-1, 4),
            special_tokens=specials,
            whole_piece=True,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
