"""Tokenizers of the Hugging Face libraries, both ways."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from .byte_alphabet import CHAR_TO_BYTE, from_stand_ins, to_stand_ins
from .formats import checked_size, pairs_to_model, parse_json, read_json
from .model import Model, check_id, make_merges
from .patterns import PUBLISHED
from .reference import apply_merges

_SEPARATORS = {"words": r"[\s\x1c-\x1f]+", "lines": r"[\r\n]+"}


def _document(source: Any) -> tuple[dict[str, Any], str]:
    """The tokenizer.json content of whatever was given, and a name for messages."""
    wrapper, source = source, getattr(source, "backend_tokenizer", source)
    if isinstance(source, os.PathLike):
        document, name = read_json(source), os.fspath(source)
    elif isinstance(source, str) and source.lstrip().startswith("{"):
        document, name = parse_json(source, "tokenizer.json"), "tokenizer.json"
    elif isinstance(source, str):
        document, name = read_json(source), source
    elif hasattr(source, "to_str"):
        name = type(source).__name__
        document = parse_json(source.to_str(), name)
    else:
        raise TypeError(
            "source must be a path, the text of a tokenizer.json, a tokenizers.Tokenizer or a "
            f"transformers fast tokenizer, got {type(source).__name__}"
        )
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError(f"{name}: not a tokenizer.json, it has no model")
    if wrapper is not source:
        # What the last call of a transformers tokenizer asked for, not a part of it.
        document.update(truncation=None, padding=None)
    return document, name


def _steps(document: dict[str, Any], part: str, key: str, name: str) -> list[dict[str, Any]]:
    """The steps of a part, which may be absent, one step, or a Sequence of steps."""
    value = document.get(part)
    if value is None:
        return []
    steps = value.get(key) if isinstance(value, dict) and value.get("type") == "Sequence" else None
    steps = [value] if steps is None else steps
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("type"), str) for step in steps
    ):
        raise ValueError(f"{name}: {part} must be a step or a Sequence of steps, got {value!r}")
    return steps


def _split_regex(step: dict[str, Any], behaviors: tuple[str, ...], name: str) -> str:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if step.get("invert") or step.get("behavior") not in behaviors or not isinstance(regex, str):
        raise ValueError(f"{name}: this Split has no counterpart: {step}")
    return regex


def _added_tokens(document: dict[str, Any], name: str) -> dict[str, int]:
    specials: dict[str, int] = {}
    tokens = document.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise ValueError(f"{name}: added_tokens must be a list, got {tokens!r}")
    for index, token in enumerate(tokens):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{name}: added_tokens[{index}] has no content: {token!r}")
        check_id(token.get("id"), f"{name}: added_tokens[{index}]: the id")
        if token["content"] in specials:
            raise ValueError(f"{name}: added_tokens[{index}] repeats {token['content']!r}")
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"{name}: the added token {token['content']!r} has {flag}")
        specials[token["content"]] = token["id"]
    return specials


def _merges(model: dict[str, Any], name: str) -> list[tuple[str, str]]:
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise ValueError(f"{name}: merges must be a list, got {type(merges).__name__}")
    pairs = []
    for index, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and part for part in parts)
        ):
            raise ValueError(f"{name}: merge {index} must be a pair, got {merge!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _check_no_additions(document: dict[str, Any], name: str) -> None:
    """ValueError for what changes the ids of a text after merging."""
    for part in ("truncation", "padding"):
        if document.get(part) is not None:
            raise ValueError(f"{name}: {part} is set, which is not supported; set it to null")
    for step in _steps(document, "post_processor", "processors", name):
        parts = step.get("single")
        whole_text = isinstance(parts, list) and all(
            isinstance(part, dict) and "Sequence" in part for part in parts
        )
        if step["type"] != "ByteLevel" and not (
            step["type"] == "TemplateProcessing" and whole_text
        ):
            raise ValueError(
                f"{name}: the post_processor {step['type']} adds special tokens to every text, "
                "which is not supported; set it to null and add them yourself"
            )


def read(source: Any) -> Model:
    """A model from a tokenizer.json in any form."""
    document, name = _document(source)
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{name}: the model is {model.get('type')}, only BPE can be read")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"{name}: the model has {key}={model[key]!r}, which is not supported")
    if document.get("normalizer") is not None:
        raise ValueError(f"{name}: the normalizer {document['normalizer']} is not supported")
    if not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{name}: vocab must be an object of token -> id")
    pairs = _merges(model, name)
    specials = _added_tokens(document, name)
    _check_no_additions(document, name)
    steps = _steps(document, "pre_tokenizer", "pretokenizers", name)
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "Metaspace"]:
        return _read_characters(model, pairs, steps, specials, name)
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(
            f"{name}: the pre-tokenizer {' + '.join(map(str, kinds))} is not supported"
        )
    level = steps[-1]
    if level.get("add_prefix_space"):
        raise ValueError(f"{name}: ByteLevel has add_prefix_space, which is not supported")
    own = level.get("use_regex", True)
    if own and len(steps) == 2:
        raise ValueError(f"{name}: ByteLevel has use_regex after a Split, which is not supported")
    pattern: str | None = "gpt2" if own else None
    if len(steps) == 2:
        pattern = _split_regex(steps[0], ("Isolated",), name)
    return pairs_to_model(
        model["vocab"],
        pairs,
        pattern=pattern,
        special_tokens=specials,
        name=name,
        whole_piece=bool(model.get("ignore_merges")),
    )


def _read_characters(
    model: dict[str, Any],
    pairs: list[tuple[str, str]],
    steps: list[dict[str, Any]],
    specials: dict[str, int],
    name: str,
) -> Model:
    """The form that `build` gives the char mode."""
    separator = _split_regex(steps[0], ("Removed",), name)
    pattern = next((p for p, regex in _SEPARATORS.items() if regex == separator), None)
    if pattern is None or steps[1].get("split", True) or model.get("fuse_unk"):
        raise ValueError(f"{name}: this Split and Metaspace have no counterpart")
    space = steps[1]
    if space.get("prepend_scheme", "always") != "always" or not space.get("add_prefix_space", True):
        raise ValueError(f"{name}: this Metaspace does not mark every word: {space}")
    if not isinstance(space.get("replacement"), str):
        raise ValueError(f"{name}: this Metaspace has no replacement: {space}")
    vocab = model["vocab"]
    size = checked_size(vocab, specials, name)
    for index, pair in enumerate(pairs):
        for part in (*pair, "".join(pair)):
            if part not in vocab:
                raise ValueError(
                    f"{name}: merge {index} {pair} needs the token {part!r}, which is not in the "
                    "vocabulary"
                )
    tokens: list[bytes | None] = [None] * size
    try:
        for token, id in vocab.items():
            if token not in specials:
                tokens[id] = token.encode()
        return Model(
            mode="char",
            pattern=pattern,
            tokens=tuple(tokens),
            merges=make_merges([(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs]),
            special_tokens=specials,
            marker=space["replacement"],
            unk=model.get("unk_token"),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_stand_ins(model: Model) -> None:
    """ValueError for a special token spelled like another token's stand-in characters.

    A vocabulary of stand-ins has one name for both, such as "é" for the byte 0xE9.
    """
    if model.mode == "char":
        return
    for text in model.special_tokens:
        if all(c in CHAR_TO_BYTE for c in text):
            token = from_stand_ins(text)
            if token in model.ids and token != text.encode():
                raise ValueError(
                    f"the special token {text!r} is the name of the token {token!r} in a "
                    "vocabulary of stand-in characters; choose another"
                )


def canonical_pairs(model: Model) -> list[tuple[int, int, int]]:
    """One (left, right, new) per merged token, in rank order.

    Where a rank has several pairs (tiktoken), the pair is the one left when the token itself is
    merged by the ranks below its own; a token for which more than two parts are left has none and
    is reached as a whole piece only.
    """
    if len(np.unique(model.merges[:, 3])) == len(model.merges):
        return [(a, b, new) for a, b, new, _ in model.merges.tolist()]
    pairs = []
    ranks: dict[tuple[int, int], tuple[int, int]] = {}
    pending: dict[tuple[int, int], tuple[int, int]] = {}
    symbols = model.symbols()
    last = None
    for left, right, new, rank in model.merges.tolist():
        if rank != last:
            ranks.update(pending)
            pending.clear()
            token = model.tokens[new] or b""
            parts = apply_merges([symbols[b] for b in token], ranks)
            if len(parts) == 2:
                pairs.append((parts[0], parts[1], new))
            last = rank
        pending[left, right] = rank, new
    return pairs


def build(model: Model) -> Any:
    """A tokenizers.Tokenizer that encodes the same (with ``add_special_tokens=False``)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    check_stand_ins(model)
    if model.mode == "char":
        name = {id: (token or b"").decode() for id, token in enumerate(model.tokens)}
        split = pre_tokenizers.Split(Regex(_SEPARATORS[model.pattern or "words"]), "removed")
        space = pre_tokenizers.Metaspace(model.marker, prepend_scheme="always", split=False)
        before: Any = pre_tokenizers.Sequence([split, space])
        decoder: Any = decoders.Metaspace(model.marker, prepend_scheme="always", split=False)
    else:
        name = {id: to_stand_ins(token or b"") for id, token in enumerate(model.tokens)}
        before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=model.pattern == "gpt2")
        if model.pattern not in (None, "gpt2"):
            regex = Regex(PUBLISHED.get(model.pattern, model.pattern))
            split = pre_tokenizers.Split(regex, "isolated")
            before = pre_tokenizers.Sequence([split, before])
        decoder = decoders.ByteLevel()
    doubled = [
        re.escape(text.encode())
        for text, id in model.special_tokens.items()
        if model.mode == "char" or model.ids.get(text.encode(), id) != id
    ]
    if doubled:
        # The text of a special token is matched before merging: tokens that hold it never occur.
        special = re.compile(b"|".join(doubled))
        name = {
            id: "" if special.search(model.tokens[id] or b"") else text for id, text in name.items()
        }
    name.update({id: text for text, id in model.special_tokens.items()})
    vocab = {text: id for id, text in name.items() if text}
    pairs = [(name[a], name[b], new) for a, b, new in canonical_pairs(model)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for a, b, new in pairs if name[new]],
            unk_token=model.unk,
            ignore_merges=model.whole_piece,
        )
    )
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, _ in sorted(model.special_tokens.items(), key=lambda item: item[1])
        ]
    )
    return tokenizer
