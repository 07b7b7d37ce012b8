"""Reading tokenizers of the Hugging Face libraries."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from .formats import checked_size, pairs_to_model, parse_json, read_json
from .model import Model, check_id, make_merges
from .normalization import FORMS
from .template import NOTHING, template_of

# How the char mode splits into words or lines.
SEPARATORS = {"words": r"[\s\x1c-\x1f]+", "lines": r"[\r\n]+"}
# Punctuation is that of ASCII, symbols included, and the category P of Unicode.
_PUNCTUATION = {"Isolated": r"[\p{P}$+<=>^`|~]", "Contiguous": r"[\p{P}$+<=>^`|~]+"}


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
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        regex = re.escape(pattern["String"])
    if step.get("invert") or step.get("behavior") not in behaviors or not isinstance(regex, str):
        raise ValueError(f"{name}: this Split has no counterpart: {step}")
    return regex


def _added_tokens(
    document: dict[str, Any], name: str
) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """The ids of the added tokens, and the flags of `added_tokens.FLAGS` that they have."""
    specials: dict[str, int] = {}
    flags: dict[str, tuple[str, ...]] = {}
    tokens = document.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise ValueError(f"{name}: added_tokens must be a list, got {tokens!r}")
    for index, token in enumerate(tokens):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{name}: added_tokens[{index}] has no content: {token!r}")
        check_id(token.get("id"), f"{name}: added_tokens[{index}]: the id")
        if token["content"] in specials:
            raise ValueError(f"{name}: added_tokens[{index}] repeats {token['content']!r}")
        specials[token["content"]] = token["id"]
        given = ["ordinary"] if not token.get("special", True) else []
        given += [f for f in ("normalized", "lstrip", "rstrip", "single_word") if token.get(f)]
        flags[token["content"]] = tuple(given)
    return specials, flags


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


def _post_processor(document: dict[str, Any], name: str) -> str | None:
    """The post-processor as JSON text; ValueError for what else changes the ids after merging."""
    for part in ("truncation", "padding"):
        if document.get(part) is not None:
            raise ValueError(f"{name}: {part} is set, which is not supported; set it to null")
    if document.get("post_processor") is None:
        return None
    text = json.dumps(document["post_processor"], ensure_ascii=False)
    try:
        template = template_of(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    # One that adds nothing is kept where it has to do with offsets.
    return None if template == NOTHING and '"ByteLevel"' not in text else text


def _normalizer(document: dict[str, Any], name: str) -> tuple[str, ...]:
    kinds = [step["type"] for step in _steps(document, "normalizer", "normalizers", name)]
    for kind in kinds:
        if kind not in FORMS:
            raise ValueError(f"{name}: the normalizer {kind} is not supported, only {FORMS} are")
    return tuple(kinds)


def _check_decoder(document: dict[str, Any], kind: str, name: str) -> None:
    for step in _steps(document, "decoder", "decoders", name):
        if step["type"] != kind:
            raise ValueError(
                f"{name}: the decoder {step['type']} is not supported where the pre-tokenizer is "
                f"{kind}; only {kind} is"
            )


def _pattern(steps: list[dict[str, Any]], name: str) -> tuple[str, ...]:
    """What the pre-tokenizers split by, one after the other; the last must be ByteLevel."""
    patterns: list[str] = []
    for step in steps[:-1]:
        kind = step["type"]
        if kind == "Split":
            patterns.append(_split_regex(step, ("Isolated",), name))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Punctuation" and step.get("behavior", "Isolated") in _PUNCTUATION:
            patterns.append(_PUNCTUATION[step.get("behavior", "Isolated")])
        else:
            raise ValueError(f"{name}: the pre-tokenizer {step} is not supported before ByteLevel")
    if not steps or steps[-1]["type"] != "ByteLevel":
        kinds = " + ".join(step["type"] for step in steps) or None
        raise ValueError(
            f"{name}: the pre-tokenizer {kinds} is not supported, it must end with ByteLevel"
        )
    if steps[-1].get("add_prefix_space", True):
        raise ValueError(f"{name}: ByteLevel has add_prefix_space, which is not supported")
    if steps[-1].get("use_regex", True):
        patterns.append("gpt2")
    return tuple(patterns)


def read(source: Any) -> Model:
    """A model from a tokenizer.json in any form."""
    document, name = _document(source)
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{name}: the model is {model.get('type')}, only BPE can be read")
    # Of the others byte_fallback, unk_token and fuse_unk concern unknown symbols only: bytes have
    # none.
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{name}: the model has {key}={model[key]!r}, which is not supported")
    if not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{name}: vocab must be an object of token -> id")
    pairs = _merges(model, name)
    specials, flags = _added_tokens(document, name)
    post_processor = _post_processor(document, name)
    normalizer = _normalizer(document, name)
    steps = _steps(document, "pre_tokenizer", "pretokenizers", name)
    if [step["type"] for step in steps] == ["Split", "Metaspace"]:
        given = {"normalizer": normalizer, "post_processor": post_processor}
        for text, own in flags.items():
            if own:
                raise ValueError(
                    f"{name}: the added token {text!r} is {' and '.join(own)}, which is not "
                    "supported beside a Metaspace"
                )
        for key, value in given.items():
            if value:
                raise ValueError(f"{name}: the {key} is not supported beside a Metaspace: {value}")
        _check_decoder(document, "Metaspace", name)
        return _read_characters(model, pairs, steps, specials, name)
    _check_decoder(document, "ByteLevel", name)
    return pairs_to_model(
        model["vocab"],
        pairs,
        pattern=_pattern(steps, name),
        special_tokens=specials,
        name=name,
        whole_piece=bool(model.get("ignore_merges")),
        token_flags=flags,
        normalizer=normalizer,
        post_processor=post_processor,
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
    pattern = next((p for p, regex in SEPARATORS.items() if regex == separator), None)
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
